//! A directory in memory, and as tree objects.

use crate::error::Error;
use crate::repo::Objects;
use gix_hash::ObjectId;
use gix_object::tree::{Entry, EntryKind};
use gix_object::{Kind, Tree};
use std::collections::BTreeMap;

/// A file or a directory.
pub(crate) enum File {
    /// Its blob.
    Blob(ObjectId),
    /// What is in it.
    Dir(Dir),
}

/// A directory by names.
#[derive(Default)]
pub(crate) struct Dir(pub BTreeMap<String, File>);

impl Dir {
    /// Puts a blob at a path below; directories on the way are made.
    pub fn put(&mut self, path: &[String], blob: ObjectId) {
        match path {
            [] => {}
            [name] => {
                self.0.insert(name.clone(), File::Blob(blob));
            }
            [name, rest @ ..] => {
                let entry = self.0.entry(name.clone());
                match entry.or_insert_with(|| File::Dir(Self::default())) {
                    File::Dir(dir) => dir.put(rest, blob),
                    File::Blob(_) => {}
                }
            }
        }
    }

    /// Writes the directory as it is.
    pub fn write(&self, objects: &Objects) -> Result<ObjectId, Error> {
        let mut entries = Vec::with_capacity(self.0.len());
        for (name, file) in &self.0 {
            entries.push(match file {
                File::Blob(id) => entry(name, EntryKind::Blob, *id),
                File::Dir(dir) => entry(name, EntryKind::Tree, dir.write(objects)?),
            });
        }
        write_tree(objects, entries)
    }
}

/// A copy of the tree `base` (or of an empty one) with `new` at `path`. Trees beside the path are not read.
pub(crate) fn graft(
    objects: &Objects,
    base: Option<ObjectId>,
    path: &[String],
    kind: EntryKind,
    new: ObjectId,
) -> Result<ObjectId, Error> {
    let [name, rest @ ..] = path else {
        return Ok(new);
    };
    let mut entries = match base {
        Some(base) => objects.tree(base)?,
        None => Vec::new(),
    };
    let there = entries
        .iter()
        .position(|entry| entry.filename == name.as_str());
    let below = there.filter(|at| entries[*at].mode.is_tree());
    let below = below.map(|at| entries[at].oid);
    let id = graft(objects, below, rest, kind, new)?;
    if let Some(at) = there {
        entries.swap_remove(at);
    }
    let kind = if rest.is_empty() {
        kind
    } else {
        EntryKind::Tree
    };
    entries.push(entry(name, kind, id));
    write_tree(objects, entries)
}

fn entry(name: &str, kind: EntryKind, id: ObjectId) -> Entry {
    Entry {
        mode: kind.into(),
        filename: name.into(),
        oid: id,
    }
}

fn write_tree(objects: &Objects, mut entries: Vec<Entry>) -> Result<ObjectId, Error> {
    entries.sort();
    objects.write(Kind::Tree, &Tree { entries })
}
