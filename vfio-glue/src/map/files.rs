//! Which descriptors are the same file (rule R4), proven and not guessed, and one descriptor held for each.
//!
//! ```text
//! descriptor ──identify──▶ FileId, the key of extents, and the file the map holds for it
//! ```
//!
//! `st_dev` and `st_ino` only find candidates. An inode number is no proof, even of a file that is held: hugetlbfs
//! takes it from a counter of 32 bits that it shares with pipes and sockets, so whoever makes 2^32 of those gets the
//! number of a neighbour's memory, and with it, if we believed it, that memory. tmpfs mounted with `inode32` wraps as
//! well; memfds of small pages have 64 bits, which is why nobody notices. Size, times and flags can be set, and what
//! lies in the pages we may not write. What a VMM cannot forge is the kernel's own comparison of the inodes:
//!
//! - kcmp(2), `KCMP_FILE`: both descriptors are one open file. So it is where one VMM sends its memory to two ports.
//! - inotify(7): two watches of one inotify instance have one number if and only if they watch one inode, found by
//!   its address in the kernel. This serves for a file opened twice; it needs `/proc` and read permission.
//!
//! Where neither answers, the two are taken for different files: their bytes are mapped and pinned twice, which is
//! always correct.
//!
//! Being the same file gives no right to it. Somebody may hold a descriptor for reading only, or one sealed against
//! new writers, of memory we have mapped writable for its owner: so each is mapped writable once itself before it is
//! let share.
//!
//! Read with: Linux `fs/hugetlbfs/inode.c` (`hugetlbfs_get_inode`), `fs/inode.c` (`get_next_ino`), `mm/shmem.c`
//! (`shmem_reserve_inode`), `fs/notify/inotify/inotify_user.c` (`inotify_update_watch`).

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::MetadataExt;
use std::sync::{Arc, Weak};

use rustix::fs::inotify;

use crate::memory::{FileError, HostRange};
use crate::sys;

/// A file, as the map tells files apart. Good for as long as the map holds the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct FileId(pub(super) u64);

#[derive(Debug)]
struct Known {
    id: FileId,
    /// Held by the extents of the file and by the regions that show it.
    file: Weak<File>,
}

/// The files of one map.
#[derive(Debug, Default)]
pub(super) struct Files {
    /// By device and inode number, under which there may be several.
    known: HashMap<(u64, u64), Vec<Known>>,
    next: u64,
}

impl Files {
    /// Says which file this is, and gives the descriptor to hold for it: the one that is held already, if one is.
    ///
    /// # Errors
    ///
    /// [`FileError::Call`] if the kernel does not tell its numbers, or refuses to map it writable by this descriptor.
    pub(super) fn identify(&mut self, file: &Arc<File>) -> Result<(FileId, Arc<File>), FileError> {
        let meta = file.metadata().map_err(|source| FileError::Call {
            call: "fstat",
            offset: 0,
            len: 0,
            source,
        })?;
        self.known.retain(|_, files| {
            files.retain(|known| known.file.strong_count() > 0);
            !files.is_empty()
        });
        let candidates = self.known.entry((meta.dev(), meta.ino())).or_default();
        for known in candidates.iter() {
            let Some(held) = known.file.upgrade() else {
                continue;
            };
            if Arc::ptr_eq(&held, file) {
                return Ok((known.id, held));
            }
            if is_one_file(&held, file) {
                HostRange::of_file(file, 0, 1)?;
                return Ok((known.id, held));
            }
        }
        let id = FileId(self.next);
        self.next += 1;
        candidates.push(Known {
            id,
            file: Arc::downgrade(file),
        });
        Ok((id, Arc::clone(file)))
    }
}

/// Whether the kernel says that both descriptors are one file. `false` also where it does not say.
fn is_one_file(a: &File, b: &File) -> bool {
    let by_open_file = sys::is_one_open_file(a, b).unwrap_or(false);
    by_open_file || is_one_inode(a, b).unwrap_or(false)
}

fn is_one_inode(a: &File, b: &File) -> io::Result<bool> {
    // An instance of its own: no other watch, and so no number used again.
    let instance = inotify::init(inotify::CreateFlags::CLOEXEC)?;
    let watch = |file: &File| {
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        // Which event does not matter, none is read.
        inotify::add_watch(instance.as_fd(), path, inotify::WatchFlags::DELETE_SELF)
    };
    Ok(watch(a)? == watch(b)?)
}

#[cfg(test)]
mod tests {
    use std::fs::OpenOptions;

    use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};

    use super::*;

    const HUGE: u64 = 2 << 20;

    fn memfd(flags: MemfdFlags) -> Arc<File> {
        let file = File::from(memfd_create("guest", MemfdFlags::CLOEXEC | flags).unwrap());
        file.set_len(HUGE).unwrap();
        Arc::new(file)
    }

    /// A second open file of the same inode.
    fn opened_again(file: &File, options: &OpenOptions) -> Arc<File> {
        let path = format!("/proc/self/fd/{}", file.as_raw_fd());
        Arc::new(options.open(path).unwrap())
    }

    fn writable() -> OpenOptions {
        let mut options = OpenOptions::new();
        options.read(true).write(true);
        options
    }

    #[test]
    fn one_file_is_known_again_by_any_descriptor_and_held_once() {
        for pages in [MemfdFlags::empty(), MemfdFlags::HUGETLB] {
            let mut files = Files::default();
            let file = memfd(pages);
            let (id, held) = files.identify(&file).unwrap();
            let sent_again = Arc::new(file.try_clone().unwrap());
            for other in [&file, &sent_again, &opened_again(&file, &writable())] {
                let (again, same) = files.identify(other).unwrap();
                assert_eq!(again, id);
                assert!(Arc::ptr_eq(&same, &held));
            }
            assert_ne!(files.identify(&memfd(pages)).unwrap().0, id);
        }
    }

    #[test]
    fn each_proof_stands_alone() {
        for pages in [MemfdFlags::empty(), MemfdFlags::HUGETLB] {
            let (file, other) = (memfd(pages), memfd(pages));
            let again = opened_again(&file, &writable());
            assert!(is_one_inode(&file, &again).unwrap());
            assert!(!is_one_inode(&file, &other).unwrap());
            let sent_again = file.try_clone().unwrap();
            assert!(sys::is_one_open_file(&file, &sent_again).unwrap());
            assert!(!sys::is_one_open_file(&file, &again).unwrap(), "opened twice");
            assert!(!sys::is_one_open_file(&file, &other).unwrap());
        }
    }

    #[test]
    fn a_forged_inode_number_does_not_make_two_files_one() {
        let mut files = Files::default();
        let (victim, forger) = (memfd(MemfdFlags::HUGETLB), memfd(MemfdFlags::HUGETLB));
        let (id, held) = files.identify(&victim).unwrap();
        // As if 2^32 pipes had been made in between: the victim is found under the forger's number.
        let numbers = |file: &File| file.metadata().map(|meta| (meta.dev(), meta.ino())).unwrap();
        let found = files.known.remove(&numbers(&victim)).unwrap();
        files.known.insert(numbers(&forger), found);
        let (other, other_held) = files.identify(&forger).unwrap();
        assert_ne!(other, id);
        assert!(!Arc::ptr_eq(&other_held, &held));
        assert_eq!(files.known[&numbers(&forger)].len(), 2, "both are kept apart");
    }

    #[test]
    fn who_may_not_write_a_file_does_not_get_it_by_another_owners_mapping() {
        let mut files = Files::default();
        let file = memfd(MemfdFlags::ALLOW_SEALING);
        let _owners = HostRange::of_file(&file, 0, HUGE).unwrap();
        files.identify(&file).unwrap();
        let for_reading = opened_again(&file, OpenOptions::new().read(true));
        assert!(matches!(
            files.identify(&for_reading),
            Err(FileError::Call { call: "mmap", .. })
        ));
        fcntl_add_seals(&file, SealFlags::FUTURE_WRITE).unwrap();
        let sealed = opened_again(&file, &writable());
        assert!(matches!(
            files.identify(&sealed),
            Err(FileError::Call { call: "mmap", .. })
        ));
    }

    #[test]
    fn a_file_nobody_holds_is_forgotten() {
        let mut files = Files::default();
        files.identify(&memfd(MemfdFlags::empty())).unwrap();
        let _held = files.identify(&memfd(MemfdFlags::empty())).unwrap();
        assert_eq!(files.known.len(), 1);
    }
}
