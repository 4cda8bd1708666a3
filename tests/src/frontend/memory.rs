//! Guest memory as a VMM has it: memfds mapped here and announced to the back end.
//!
//! ```text
//! Plan ──memfd──▶ Region ──Announcement + fd──▶ vmm.rs ──▶ back end
//!                   └────mmap──▶ GuestMemory::read/write ◀── driver.rs
//! ```
//!
//! Regions may lie anywhere in the guest-physical space, touch or leave holes, start at a nonzero offset of
//! their file, sit on 2 MiB pages, or be wrong on purpose. One handle is shared by the driver and the
//! connection, so a hot-plugged region is seen by both.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::Ordering;
use std::sync::{Arc, RwLock};

use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{MemfdFlags, Mode, OFlags, ftruncate, memfd_create, open};
use vm_memory::{Bytes, FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap, MmapRegion};

/// What a region is made of.
#[derive(Clone, Debug)]
pub enum Backing {
    /// An own memfd.
    Memfd,
    /// An own memfd of 2 MiB pages; the length must be a multiple of it.
    Hugetlb2M,
    /// A file that several regions may share.
    File(Arc<File>),
}

/// How the announcement of a region lies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flaw {
    /// It tells the truth.
    None,
    /// The file ends in the middle of what is announced.
    ShorterThanAnnounced,
    /// The descriptor was opened for reading only, so it cannot be mapped shared and writable.
    ReadOnly,
    /// The descriptor is an eventfd, which is no memory at all: what a VMM with private RAM might send.
    NotMemory,
}

/// One region as it shall be.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Guest-physical start.
    pub gpa: u64,
    /// Where the front-end says it has the region mapped.
    pub user: u64,
    /// Length in bytes.
    pub len: u64,
    /// Where in the file the region starts.
    pub file_offset: u64,
    /// What it is made of.
    pub backing: Backing,
    /// How the announcement lies, if it does.
    pub flaw: Flaw,
}

impl Plan {
    /// An honest region on an own memfd; the front-end's address is `gpa` moved up by 1 TiB, as QEMU's
    /// addresses differ from the guest's.
    pub fn new(gpa: u64, len: u64) -> Self {
        let user = gpa + (1 << 40);
        Self {
            gpa,
            user,
            len,
            file_offset: 0,
            backing: Backing::Memfd,
            flaw: Flaw::None,
        }
    }

    /// Sets the front-end's address.
    pub fn user(self, user: u64) -> Self {
        Self { user, ..self }
    }

    /// Starts the region at `file_offset` of its file.
    pub fn file_offset(self, file_offset: u64) -> Self {
        Self { file_offset, ..self }
    }

    /// Makes the region of something else than an own memfd.
    pub fn backing(self, backing: Backing) -> Self {
        Self { backing, ..self }
    }

    /// Makes the announcement lie.
    pub fn flaw(self, flaw: Flaw) -> Self {
        Self { flaw, ..self }
    }

    fn make(&self) -> io::Result<Region> {
        let end = self.file_offset + self.len;
        let file = match &self.backing {
            Backing::Memfd => memfd(end, MemfdFlags::CLOEXEC)?,
            Backing::Hugetlb2M => memfd(
                end,
                MemfdFlags::CLOEXEC | MemfdFlags::HUGETLB | MemfdFlags::HUGE_2MB,
            )?,
            Backing::File(file) => {
                if file.metadata()?.len() < end {
                    file.set_len(end)?;
                }
                Arc::clone(file)
            }
        };
        let announced: Arc<OwnedFd> = Arc::new(match self.flaw {
            Flaw::None => file.try_clone()?.into(),
            Flaw::ShorterThanAnnounced => {
                file.set_len(self.file_offset + self.len / 2)?;
                file.try_clone()?.into()
            }
            Flaw::ReadOnly => {
                use std::os::fd::AsRawFd;
                let path = format!("/proc/self/fd/{}", file.as_raw_fd());
                open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?
            }
            Flaw::NotMemory => eventfd(0, EventfdFlags::CLOEXEC)?,
        });
        // A lying region is never used by the driver, so it is not mapped here: no own SIGBUS.
        let mapping = match self.flaw {
            Flaw::None => {
                let length = usize::try_from(self.len).map_err(io::Error::other)?;
                let offset = FileOffset::from_arc(file, self.file_offset);
                let mapping = MmapRegion::from_file(offset, length).map_err(io::Error::other)?;
                let region = GuestRegionMmap::new(mapping, GuestAddress(self.gpa));
                Some(Arc::new(
                    region.ok_or_else(|| io::Error::other("region end overflows"))?,
                ))
            }
            _ => None,
        };
        Ok(Region {
            plan: self.clone(),
            announced,
            mapping,
        })
    }
}

/// Makes a memfd of `len` bytes that regions can share by [`Backing::File`].
///
/// # Errors
///
/// What memfd_create and ftruncate report.
pub fn shared_file(len: u64) -> io::Result<Arc<File>> {
    memfd(len, MemfdFlags::CLOEXEC)
}

fn memfd(len: u64, flags: MemfdFlags) -> io::Result<Arc<File>> {
    let fd = memfd_create("guest-memory", flags)?;
    ftruncate(&fd, len)?;
    Ok(Arc::new(File::from(fd)))
}

/// What a front-end says about a region (vhost-user, "Memory region description").
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Announcement {
    /// Guest-physical start.
    pub gpa: u64,
    /// Length in bytes.
    pub len: u64,
    /// The front-end's address.
    pub user: u64,
    /// Offset in the file.
    pub file_offset: u64,
}

/// One region of guest memory.
#[derive(Clone, Debug)]
pub struct Region {
    plan: Plan,
    announced: Arc<OwnedFd>,
    mapping: Option<Arc<GuestRegionMmap>>,
}

impl Region {
    /// The numbers the back end is told.
    pub fn announcement(&self) -> Announcement {
        let Plan {
            gpa,
            user,
            len,
            file_offset,
            ..
        } = self.plan;
        Announcement {
            gpa,
            len,
            user,
            file_offset,
        }
    }

    /// The file the back end is given.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.announced.as_fd()
    }
}

#[derive(Debug, Default)]
struct Inner {
    regions: Vec<Region>,
    map: GuestMemoryMmap,
}

/// The guest's memory: a shared handle.
#[derive(Clone, Debug, Default)]
pub struct GuestMemory(Arc<RwLock<Inner>>);

impl GuestMemory {
    /// Makes memory of `plans`.
    ///
    /// # Errors
    ///
    /// What making and mapping the files reports, or an overlap.
    pub fn new(plans: &[Plan]) -> io::Result<Self> {
        let memory = Self::default();
        for plan in plans {
            memory.add(plan)?;
        }
        Ok(memory)
    }

    /// Plugs in one more region; the back end has to be told separately.
    ///
    /// # Errors
    ///
    /// As [`new`](Self::new).
    pub fn add(&self, plan: &Plan) -> io::Result<Region> {
        let region = plan.make()?;
        let mut inner = self.write_lock();
        if let Some(mapping) = &region.mapping {
            inner.map = inner
                .map
                .insert_region(Arc::clone(mapping))
                .map_err(io::Error::other)?;
        }
        inner.regions.push(region.clone());
        Ok(region)
    }

    /// Takes the region at `gpa` away again; the back end has to be told separately.
    ///
    /// # Panics
    ///
    /// If there is no such region.
    pub fn remove(&self, gpa: u64) -> Region {
        let mut inner = self.write_lock();
        let at = inner
            .regions
            .iter()
            .position(|r| r.plan.gpa == gpa)
            .expect("a region starts there");
        let region = inner.regions.remove(at);
        if region.mapping.is_some() {
            let removed = inner.map.remove_region(GuestAddress(gpa), region.plan.len);
            inner.map = removed.expect("a mapped region can be removed").0;
        }
        region
    }

    /// All regions, in the order they were added.
    pub fn regions(&self) -> Vec<Region> {
        self.read_lock().regions.clone()
    }

    /// The front-end's address of `gpa`: ring addresses travel in this form.
    ///
    /// # Panics
    ///
    /// If no region holds `gpa`.
    pub fn user_address(&self, gpa: u64) -> u64 {
        let inner = self.read_lock();
        let plan = inner
            .regions
            .iter()
            .map(|r| &r.plan)
            .find(|p| (p.gpa..p.gpa + p.len).contains(&gpa));
        let plan = plan.unwrap_or_else(|| panic!("{gpa:#x} is not in guest memory"));
        plan.user + (gpa - plan.gpa)
    }

    /// Copies bytes out, across touching regions if need be.
    ///
    /// # Panics
    ///
    /// If a byte is not in guest memory; so do the other accesses here.
    pub fn read(&self, gpa: u64, into: &mut [u8]) {
        self.read_lock()
            .map
            .read_slice(into, GuestAddress(gpa))
            .expect("the driver reads its own memory");
    }

    /// Copies `len` bytes out.
    pub fn read_vec(&self, gpa: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.read(gpa, &mut bytes);
        bytes
    }

    /// Copies bytes in.
    pub fn write(&self, gpa: u64, bytes: &[u8]) {
        self.read_lock()
            .map
            .write_slice(bytes, GuestAddress(gpa))
            .expect("the driver writes its own memory");
    }

    /// Loads a ring index the back end may be storing: everything it wrote before is visible after.
    pub fn load_u16(&self, gpa: u64) -> u16 {
        let value = self.read_lock().map.load(GuestAddress(gpa), Ordering::Acquire);
        u16::from_le(value.expect("the driver reads its own ring"))
    }

    /// Stores a ring index the back end may be loading: everything written before becomes visible first.
    pub fn store_u16(&self, gpa: u64, value: u16) {
        let stored = self
            .read_lock()
            .map
            .store(value.to_le(), GuestAddress(gpa), Ordering::Release);
        stored.expect("the driver writes its own ring");
    }

    /// A copy of every mapped byte, to compare later.
    pub fn snapshot(&self) -> Snapshot {
        let regions = self.regions();
        let mapped = regions.iter().filter(|region| region.mapping.is_some());
        Snapshot(
            mapped
                .map(|region| {
                    let len = usize::try_from(region.plan.len).expect("a mapped region fits");
                    (region.plan.gpa, self.read_vec(region.plan.gpa, len))
                })
                .collect(),
        )
    }

    fn read_lock(&self) -> std::sync::RwLockReadGuard<'_, Inner> {
        self.0.read().expect("no holder of the lock panics")
    }

    fn write_lock(&self) -> std::sync::RwLockWriteGuard<'_, Inner> {
        self.0.write().expect("no holder of the lock panics")
    }
}

/// Guest memory as it was at one moment.
#[derive(Debug, PartialEq, Eq)]
pub struct Snapshot(Vec<(u64, Vec<u8>)>);

impl Snapshot {
    /// The bytes of the region that starts at `gpa`.
    ///
    /// # Panics
    ///
    /// If there was none.
    pub fn bytes_at(&self, gpa: u64) -> &[u8] {
        let region = self.0.iter().find(|(start, _)| *start == gpa);
        &region.expect("a region starts there").1
    }

    /// The first guest address at which `later` differs, if any.
    pub fn first_difference(&self, later: &Self) -> Option<u64> {
        self.0
            .iter()
            .zip(&later.0)
            .find_map(|((gpa, before), (_, after))| {
                let at = before.iter().zip(after).position(|(a, b)| a != b)?;
                Some(gpa + u64::try_from(at).expect("an offset fits"))
            })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_write_crosses_touching_regions_and_stops_at_a_hole() {
        let plans = [
            Plan::new(0, 0x1000),
            Plan::new(0x1000, 0x1000).file_offset(0x2000),
            Plan::new(0x8000, 0x1000),
        ];
        let memory = GuestMemory::new(&plans).unwrap();
        memory.write(0xffc, &[1, 2, 3, 4, 5, 6, 7, 8]);
        assert_eq!(memory.read_vec(0xffe, 4), [3, 4, 5, 6]);
        assert_eq!(memory.user_address(0x1004), (1 << 40) + 0x1004);
        memory.remove(0x1000);
        let crossing = std::panic::catch_unwind(|| memory.read_vec(0xffe, 4));
        assert!(crossing.is_err());
    }

    #[test]
    fn a_snapshot_names_the_first_changed_byte() {
        let memory = GuestMemory::new(&[Plan::new(0x4000, 0x1000)]).unwrap();
        let before = memory.snapshot();
        assert_eq!(before.first_difference(&memory.snapshot()), None);
        memory.write(0x4567, &[1]);
        assert_eq!(before.first_difference(&memory.snapshot()), Some(0x4567));
    }
}
