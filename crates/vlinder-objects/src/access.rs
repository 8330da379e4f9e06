//! With what S3-compatible storage is reached: server, region, credential.

use std::collections::BTreeMap;
use std::fmt;
use url::Url;

/// Names under which the environment may name the server, the first that is set wins.
const ENDPOINTS: [&str; 3] = ["AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"];

/// Server, region and credential, by the names that AWS gave them (`AWS_ACCESS_KEY_ID`, …).
#[derive(Clone, Default, PartialEq, Eq)]
pub struct Access(BTreeMap<String, String>);

impl Access {
    /// Of variables; those that are none of AWS's do not count.
    pub fn of<N: Into<String>, V: Into<String>>(
        variables: impl IntoIterator<Item = (N, V)>,
    ) -> Self {
        let all = variables.into_iter().map(|(n, v)| (n.into(), v.into()));
        let set = all.filter(|(name, value)| name.starts_with("AWS_") && !value.is_empty());
        Self(set.collect())
    }

    /// Whether there is anything to go by. Without, nobody meant this node to use such storage.
    pub fn is_set(&self) -> bool {
        !self.0.is_empty()
    }

    /// The server, if it is not Amazon's.
    pub fn endpoint(&self) -> Option<&str> {
        ENDPOINTS
            .iter()
            .find_map(|name| self.0.get(*name))
            .map(String::as_str)
    }

    pub(crate) fn variables(&self) -> impl Iterator<Item = (&str, &str)> {
        self.0
            .iter()
            .map(|(name, value)| (name.as_str(), value.as_str()))
    }

    pub(crate) fn is_plain_http(&self) -> bool {
        self.endpoint()
            .is_some_and(|url| url.starts_with("http://"))
    }

    /// A place for people, without credentials.
    pub(crate) fn place(&self, bucket: &str, prefix: &str) -> String {
        let slash = if prefix.is_empty() { "" } else { "/" };
        let server = self.endpoint().map_or("AWS".to_owned(), without_credential);
        format!("s3://{bucket}{slash}{prefix} at {server}")
    }
}

fn without_credential(text: &str) -> String {
    let Ok(mut url) = Url::parse(text) else {
        return "a server whose address cannot be read".to_owned();
    };
    let _ = url.set_username("");
    let _ = url.set_password(None);
    url.as_str().trim_end_matches('/').to_owned()
}

/// Names only: the values are credentials.
impl fmt::Debug for Access {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.0.keys()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_shows_no_credential() {
        let vars = [
            ("AWS_ENDPOINT_URL", "http://a:1"),
            ("AWS_ENDPOINT_URL_S3", "https://user:pass@b:2/"),
            ("AWS_SECRET_ACCESS_KEY", "s3cret"),
            ("PATH", "/bin"),
            ("AWS_REGION", ""),
        ];
        let access = Access::of(vars);
        assert_eq!(access.place("x", "y/z"), "s3://x/y/z at https://b:2");
        assert_eq!(access.variables().count(), 3);
        assert!(!access.is_plain_http());
        assert!(!format!("{access:?}").contains("s3cret"));
    }

    #[test]
    fn nothing_is_not_access() {
        assert!(!Access::of([("HOME", "/")]).is_set());
        assert_eq!(Access::default().place("x", ""), "s3://x at AWS");
    }
}
