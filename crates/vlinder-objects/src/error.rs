//! What can go wrong, by who can do something about it.

/// Who can do something about a failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ErrorKind {
    /// There is no such bucket: whoever owns the account must make it, or the name is wrong.
    NoBucket,
    /// The credential is wrong or allows too little.
    Refused,
    /// The server cannot be reached, does not answer or fails; later it may.
    Away,
    /// The request makes no sense: a name that cannot be, an object that is too large, a setting.
    Unusable,
}

/// Why a request to S3-compatible storage failed.
#[derive(Debug, thiserror::Error)]
#[error("{place}: {what}")]
pub struct Error {
    kind: ErrorKind,
    place: String,
    what: String,
}

type Cause = Box<dyn std::error::Error + Send + Sync>;

/// Most characters of a server's own words that a message repeats.
const CAUSE_CHARS_MAX: usize = 300;

impl Error {
    pub(crate) fn new(kind: ErrorKind, place: &str, cause: Cause) -> Self {
        Self {
            kind,
            place: place.to_owned(),
            what: brief(&cause.to_string()),
        }
    }

    /// Sorts a failure of the client.
    pub(crate) fn of(place: &str, error: object_store::Error) -> Self {
        use object_store::Error as E;
        let text = chain(&error);
        let (kind, what) = match &error {
            // A listing says so only in the server's words.
            _ if names_bucket(&text) => (ErrorKind::NoBucket, "there is no such bucket".to_owned()),
            E::NotFound { .. } => {
                let what = "there is no such object, or no such bucket";
                (ErrorKind::NoBucket, what.to_owned())
            }
            _ if is_refusal(&error, &text) => {
                let code = code(&text).unwrap_or("without a reason");
                let what = format!("the server refuses the credential ({code})");
                (ErrorKind::Refused, what)
            }
            E::InvalidPath { .. }
            | E::NotSupported { .. }
            | E::NotImplemented { .. }
            | E::UnknownConfigurationKey { .. } => (ErrorKind::Unusable, brief(&text)),
            _ if is_redirect(&text) => (
                ErrorKind::Unusable,
                "the bucket is in another region; set s3.region or AWS_REGION".to_owned(),
            ),
            _ => (
                ErrorKind::Away,
                format!("the server is away or fails: {}", brief(&text)),
            ),
        };
        Self {
            kind,
            place: place.to_owned(),
            what,
        }
    }

    /// Who can do something about it.
    pub fn kind(&self) -> ErrorKind {
        self.kind
    }

    pub(crate) fn names_bucket(&self) -> bool {
        self.what.ends_with("no such bucket") && !self.what.contains("object")
    }
}

/// The client tells only "not found"; what was not found stands in the server's words.
fn names_bucket(text: &str) -> bool {
    code(text) == Some("NoSuchBucket")
}

fn is_refusal(error: &object_store::Error, text: &str) -> bool {
    use object_store::Error as E;
    let is_said = matches!(
        error,
        E::PermissionDenied { .. } | E::Unauthenticated { .. }
    );
    is_said || text.contains("status code: 403") || text.contains("status code: 401")
}

fn is_redirect(text: &str) -> bool {
    text.contains("PermanentRedirect") || text.contains("AuthorizationHeaderMalformed")
}

/// The code in an answer of the form `<Error><Code>…</Code>`.
fn code(text: &str) -> Option<&str> {
    let (_, after) = text.split_once("<Code>")?;
    let (code, _) = after.split_once("</Code>")?;
    let sane = code.len() <= 64 && code.bytes().all(|b| b.is_ascii_alphanumeric());
    sane.then_some(code)
}

fn brief(text: &str) -> String {
    let line: String = text
        .chars()
        .map(|c| if c.is_control() { ' ' } else { c })
        .take(CAUSE_CHARS_MAX)
        .collect();
    line
}

/// An error with those causes that its own words do not repeat already.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let more = error.to_string();
        if !text.contains(&more) {
            text.push_str(": ");
            text.push_str(&more);
        }
        cause = error.source();
    }
    text
}
