//! Between the node's file and the home of a store: states are brought home when they are made, and
//! fetched from there by nodes that lack them.

use crate::db::Lacking;
use crate::home::{Home, HomeError};
use crate::stores::{Done, Outcome, Work};
use crate::{Error, Service, Stores};
use bytes::Bytes;
use futures::{StreamExt, TryStreamExt};
use std::collections::{HashSet, VecDeque};
use std::sync::Arc;
use vlinder_core::merkle::{self, References};
use vlinder_core::{ContentHash, StateRoot};

/// Chunks under way to or from a home at once.
const IN_FLIGHT: usize = 16;
/// Bytes of chunks held at once on their way; one more of any size may come on top.
const IN_FLIGHT_BYTES: usize = 32 * 1024 * 1024;
/// So often a call that lacks chunks gets them one by one: that is the path to one key. A call that
/// lacks more reads a part of the tree, and gets twice as many each time.
const SINGLE_FETCHES: u32 = 8;
/// Most chunks that are fetched for a call before it is tried again.
const FETCH_MAX: usize = 2048;
/// Longest value that is fetched before it is asked for, in bytes.
const AHEAD_BYTES_MAX: u64 = 64 * 1024;

/// How much of a tree is fetched when a call lacks its `miss`-th chunk.
fn chunks_to_fetch(miss: u32) -> usize {
    let doublings = miss.saturating_sub(SINGLE_FETCHES).min(16);
    (1 << doublings).min(FETCH_MAX)
}

impl Stores {
    /// Goes on with a call that lacks a chunk, with what the home has. What the home lacks as well,
    /// or cannot give now, is left to the log.
    pub(crate) async fn with_home(
        &self,
        home: &Home,
        work: &Arc<Work>,
        mut outcome: Outcome,
    ) -> Result<Outcome, Error> {
        let mut miss = 0;
        let mut last = None;
        while let Err(merkle::Error::Missing(chunk)) = outcome {
            // Fetched and missing again: somebody takes the file away under us.
            if last.replace(chunk) == Some(chunk) {
                break;
            }
            let with_values = work.service() == Service::Vec;
            match self
                .fetch_from(home, chunk, chunks_to_fetch(miss), with_values)
                .await
            {
                Ok(true) => {}
                Ok(false) => break,
                Err(Error::Home(error)) => {
                    tracing::warn!(%error, "a store's home does not answer, reading the log instead");
                    break;
                }
                Err(error) => return Err(error),
            }
            miss += 1;
            outcome = self.try_once(work).await?;
        }
        Ok(outcome)
    }

    /// Fetches a chunk and some of those below it. Whether it was there.
    async fn fetch_from(
        &self,
        home: &Home,
        chunk: ContentHash,
        count: usize,
        with_values: bool,
    ) -> Result<bool, Error> {
        let mut wanted = VecDeque::from([chunk]);
        let mut seen = HashSet::from([chunk]);
        let (mut fetched, mut bytes) = (Vec::new(), 0);
        while !wanted.is_empty() && fetched.len() < count && bytes < IN_FLIGHT_BYTES {
            let next = wanted.len().min(count - fetched.len());
            let batch: Vec<ContentHash> = wanted.drain(..next).collect();
            let mut arriving = futures::stream::iter(batch)
                .map(|hash| async move { Ok::<_, HomeError>((hash, home.get(&hash).await?)) })
                .buffered(IN_FLIGHT);
            let mut below = Vec::new();
            while let Some((hash, found)) = arriving.try_next().await? {
                let Some(found) = found else {
                    if hash == chunk {
                        return Ok(false);
                    }
                    continue;
                };
                // A value may look like a node; then what is fetched for it is fetched in vain.
                let refers = merkle::references(&found).unwrap_or_default();
                below.extend(refers.nodes);
                if with_values {
                    let short = refers
                        .values
                        .into_iter()
                        .filter(|(_, len)| *len <= AHEAD_BYTES_MAX);
                    below.extend(short.map(|(hash, _)| hash));
                }
                bytes += found.len();
                fetched.push((hash, found));
                if bytes >= IN_FLIGHT_BYTES {
                    break;
                }
            }
            below.retain(|hash| seen.insert(*hash));
            wanted.extend(self.on_file(move |opened| opened.db.absent(&below)).await?);
        }
        let name = home.name().to_owned();
        self.on_file(move |opened| opened.db.take_from(&name, &fetched))
            .await?;
        Ok(true)
    }

    /// Brings a state home, with all below it that is not there yet. `done` made it.
    pub(crate) async fn bring_home(&self, home: &Home, done: &Done) -> Result<(), Error> {
        let Some(root) = done.answer.state else {
            return Ok(());
        };
        let levels = self.not_at_home(home, root, &done.fresh).await?;
        for level in levels.into_iter().rev() {
            let mut rest = level.into_iter().peekable();
            while rest.peek().is_some() {
                self.bring_some(home, &mut rest).await?;
            }
        }
        Ok(())
    }

    /// The chunks of a state that are not at home, from the root down, those of one depth together.
    async fn not_at_home(
        &self,
        home: &Home,
        root: StateRoot,
        fresh: &HashSet<ContentHash>,
    ) -> Result<Vec<Vec<ContentHash>>, Error> {
        let root = ContentHash::from_bytes(*root.as_bytes());
        let (mut levels, mut seen) = (Vec::new(), HashSet::from([root]));
        let mut level = vec![(root, true)];
        while !level.is_empty() {
            let name = home.name().to_owned();
            let lacking = self
                .on_file(move |opened| opened.db.not_known_at(&name, &level))
                .await?;
            let (known, unsure): (Vec<_>, Vec<_>) = lacking
                .into_iter()
                .partition(|chunk| fresh.contains(&chunk.hash));
            let (there, absent) = ask(home, unsure).await?;
            self.remember(home, there).await?;

            let mut next = Vec::new();
            let mut here = Vec::new();
            for Lacking { hash, refers, .. } in known.into_iter().chain(absent) {
                here.push(hash);
                let References { nodes, values } = refers;
                next.extend(nodes.into_iter().map(|hash| (hash, true)));
                next.extend(values.into_iter().map(|(hash, _)| (hash, false)));
            }
            next.retain(|(hash, _)| seen.insert(*hash));
            levels.push(here);
            level = next;
        }
        Ok(levels)
    }

    /// Brings as many chunks as may be under way at once.
    async fn bring_some(
        &self,
        home: &Home,
        rest: &mut impl Iterator<Item = ContentHash>,
    ) -> Result<(), Error> {
        let (mut batch, mut bytes) = (Vec::new(), 0);
        while batch.len() < IN_FLIGHT && bytes < IN_FLIGHT_BYTES {
            let Some(hash) = rest.next() else { break };
            let found = self.on_file(move |opened| opened.db.chunk(&hash)).await?;
            let found = Bytes::from(found.ok_or(Error::FileReplaced)?);
            bytes += found.len();
            batch.push((hash, found));
        }
        let brought = batch.iter().map(|(hash, _)| *hash).collect();
        futures::stream::iter(batch)
            .map(|(hash, bytes)| async move { home.put(&hash, bytes).await })
            .buffer_unordered(IN_FLIGHT)
            .try_collect::<()>()
            .await?;
        self.remember(home, brought).await
    }

    async fn remember(&self, home: &Home, there: Vec<ContentHash>) -> Result<(), Error> {
        if there.is_empty() {
            return Ok(());
        }
        let name = home.name().to_owned();
        self.on_file(move |opened| opened.db.remember(&name, &there))
            .await
    }
}

/// Asks the home for chunks that may be there, e.g. since the node's file was lost.
async fn ask(home: &Home, unsure: Vec<Lacking>) -> Result<(Vec<ContentHash>, Vec<Lacking>), Error> {
    let mut answers = futures::stream::iter(unsure)
        .map(|chunk| async move {
            let has = home.has(&chunk.hash, chunk.is_node).await?;
            Ok::<_, HomeError>((has, chunk))
        })
        .buffer_unordered(IN_FLIGHT);
    let (mut there, mut absent) = (Vec::new(), Vec::new());
    while let Some((has, chunk)) = answers.try_next().await? {
        match has {
            true => there.push(chunk.hash),
            false => absent.push(chunk),
        }
    }
    Ok((there, absent))
}

#[cfg(test)]
mod tests {
    use super::chunks_to_fetch;

    #[test]
    fn a_path_is_fetched_chunk_by_chunk_and_a_tree_in_doublings() {
        assert_eq!(chunks_to_fetch(0), 1);
        assert_eq!(chunks_to_fetch(8), 1);
        assert_eq!(chunks_to_fetch(9), 2);
        assert_eq!(chunks_to_fetch(1000), 2048);
    }
}
