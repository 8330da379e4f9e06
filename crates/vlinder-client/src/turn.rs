//! One turn, seen from the client: sent once, followed to its end.
//!
//! The submission id is made here before anything is sent. When the stream breaks — or the first
//! answer never came — the same submission is sent again, which attaches to the turn if it was
//! stored and begins it if it was not. It never becomes two turns.

use crate::calls::harness_client;
use crate::error::Error;
use crate::pool::{Client, PAUSE_MAX, Repeat};
use std::time::Duration;
use tokio::time::Instant;
use tonic::Streaming;
use vlinder_config::Service;
use vlinder_core::SubmissionId;
use vlinder_proto::harness as proto;
use vlinder_proto::harness::run_event::Event;

/// How long after a turn's deadline its end may still arrive: the harness ends it half a second
/// after, and needs a leader for that.
const GRACE: Duration = Duration::from_secs(12);
/// First pause before a turn is taken up again.
const PAUSE_FIRST: Duration = Duration::from_millis(50);
/// How long the harness may take to store a turn, before it is asked again.
const ACCEPT: Duration = Duration::from_secs(10);

/// What happens in a turn.
#[derive(Debug, Clone, PartialEq)]
pub enum TurnEvent {
    /// It is stored and will end. Once per turn, before anything else but [`TurnEvent::Broken`].
    Accepted(proto::Accepted),
    /// Something said before the end. Pieces may be missing where the connection broke.
    Chunk(proto::Chunk),
    /// Nobody can serve it at the moment, and why.
    Waiting(String),
    /// The connection broke, and why; it is being taken up again.
    Broken(String),
    /// It ended. The last event.
    End(proto::End),
}

enum Link {
    /// Not connected since; the next try comes at.
    Down {
        since: Instant,
        next: Instant,
        pause: Duration,
        cause: Option<Error>,
    },
    Up {
        stream: Box<Streaming<proto::RunEvent>>,
        /// The harness that it comes from.
        address: String,
    },
    Done,
}

/// A turn that was asked for.
pub struct Turn {
    client: Client,
    request: proto::RunRequest,
    link: Link,
    accepted: bool,
    /// When the turn must have ended, where we know its time limit.
    until: Option<Instant>,
}

impl Client {
    /// A turn. Nothing is sent before [`Turn::next`]. Without a submission id one is made here, which
    /// is then known to be new; the namespace is the client's where none is named.
    pub fn run(&self, mut request: proto::RunRequest) -> Turn {
        if request.submission.is_empty() {
            request.submission = SubmissionId::fresh().to_string();
            request.first_try = true;
        } else {
            request.first_try = false;
        }
        if request.namespace.is_empty() {
            request.namespace = self.namespace().to_owned();
        }
        let now = Instant::now();
        let limit = Duration::from_millis(request.timeout_ms);
        let until = (!limit.is_zero()).then(|| now + limit + GRACE);
        let link = Link::Down {
            since: now,
            next: now,
            pause: PAUSE_FIRST,
            cause: None,
        };
        Turn {
            client: self.clone(),
            request,
            link,
            accepted: false,
            until,
        }
    }
}

impl Turn {
    /// Its submission id: the name to attach, cancel or look it up by.
    pub fn submission(&self) -> &str {
        &self.request.submission
    }

    /// The next event; `None` after the end. Cancel-safe: a future that is dropped loses no event
    /// and never makes a second turn.
    ///
    /// Fails when the harness refuses the turn, when nothing listens at the first try, or when the
    /// turn's deadline (or, where that is unknown, `Limits::reattach`) passes without a connection.
    pub async fn next(&mut self) -> Result<Option<TurnEvent>, Error> {
        loop {
            match &mut self.link {
                Link::Done => return Ok(None),
                Link::Down { .. } => {
                    if let Some(event) = self.connect().await? {
                        return Ok(Some(event));
                    }
                }
                Link::Up { stream, address } => {
                    let message = match self.until {
                        None => stream.message().await,
                        Some(until) => match tokio::time::timeout_at(until, stream.message()).await
                        {
                            Ok(message) => message,
                            Err(_) => return Err(self.lost("its deadline has passed")),
                        },
                    };
                    let broken = match message {
                        Ok(Some(message)) => match self.take(message) {
                            Some(event) => return Ok(Some(event)),
                            None => continue,
                        },
                        // A harness that drains ends its streams.
                        Ok(None) => Error::Usage("the stream ended before the turn did".to_owned()),
                        Err(status) => {
                            let error = Error::of_status("harness", address, &status);
                            if !error.is_transient() {
                                self.link = Link::Done;
                                return Err(error);
                            }
                            error
                        }
                    };
                    return Ok(Some(self.down(broken)));
                }
            }
        }
    }

    /// Notes that the connection is gone.
    fn down(&mut self, cause: Error) -> TurnEvent {
        let now = Instant::now();
        let text = cause.to_string();
        let (since, pause) = match self.link {
            Link::Down { since, pause, .. } => (since, (pause * 2).min(PAUSE_MAX)),
            Link::Up { .. } | Link::Done => (now, PAUSE_FIRST),
        };
        self.link = Link::Down {
            since,
            next: now + pause,
            pause,
            cause: Some(cause),
        };
        TurnEvent::Broken(text)
    }

    fn lost(&mut self, cause: &str) -> Error {
        self.link = Link::Done;
        Error::TurnLost {
            submission: self.request.submission.clone(),
            cause: cause.to_owned(),
        }
    }

    /// One try to begin or take up the turn. `Some`: the first time that it failed.
    async fn connect(&mut self) -> Result<Option<TurnEvent>, Error> {
        let Link::Down {
            since, next, cause, ..
        } = &self.link
        else {
            return Ok(None);
        };
        let (since, next, known) = (*since, *next, cause.is_some());
        let reattach = self.client.limits().reattach;
        let give_up = self.until.unwrap_or(since + reattach);
        if next >= give_up {
            let cause = match cause {
                Some(cause) => cause.to_string(),
                None => "no time is left".to_owned(),
            };
            return Err(self.lost(&cause));
        }
        tokio::time::sleep_until(next).await;
        let request = self.request.clone();
        // From here on the harness may have seen it.
        self.request.first_try = false;
        let each = ACCEPT.min(give_up.saturating_duration_since(Instant::now()));
        // `Never`: what to repeat, and as what, is decided here.
        let opened = self
            .client
            .call_somewhere(Service::Harness, Repeat::Never, each, each, |conn| {
                let request = request.clone();
                async move { harness_client(conn).run(request).await }
            })
            .await;
        match opened {
            Ok((stream, address)) => {
                self.link = Link::Up {
                    stream: Box::new(stream),
                    address,
                };
                Ok(None)
            }
            // Nothing listens and nothing was sent: there is no turn to look after.
            Err(error @ Error::Unreachable { .. }) if !known => {
                self.link = Link::Done;
                Err(error)
            }
            Err(error) if error.is_transient() => {
                let event = self.down(error);
                Ok((!known).then_some(event))
            }
            Err(error) => {
                self.link = Link::Done;
                Err(error)
            }
        }
    }

    fn take(&mut self, message: proto::RunEvent) -> Option<TurnEvent> {
        match message.event? {
            Event::Accepted(accepted) => {
                if self.accepted {
                    return None;
                }
                self.accepted = true;
                // A promotion meanwhile must not lead the next try elsewhere.
                self.request.session.clone_from(&accepted.session);
                self.request.branch.clone_from(&accepted.branch);
                Some(TurnEvent::Accepted(accepted))
            }
            Event::Chunk(chunk) => Some(TurnEvent::Chunk(chunk)),
            Event::Waiting(waiting) => Some(TurnEvent::Waiting(waiting.reason)),
            Event::End(end) => {
                self.link = Link::Done;
                Some(TurnEvent::End(end))
            }
        }
    }
}
