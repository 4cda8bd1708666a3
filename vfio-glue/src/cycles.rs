//! The CPU's time stamp counter: what a pass of a worker costs, told in the unit that peers use.
//!
//! Read with: Intel SDM volume 3, "Time-Stamp Counter".

/// A count that goes up at a constant rate while this thread stays on one CPU: cycles of the time stamp counter where there
/// is one, else nanoseconds. Compare by `wrapping_sub`.
#[cfg(target_arch = "x86_64")]
#[inline]
#[expect(
    unsafe_code,
    reason = "the compiler has the instruction as an unsafe function"
)]
pub fn now() -> u64 {
    // SAFETY: RDTSC touches no memory, and every x86-64 has it; Linux lets every process use it, unless one asked to be
    // killed for it (PR_SET_TSC), which we do not.
    unsafe { core::arch::x86_64::_rdtsc() }
}

/// A count that goes up at a constant rate: nanoseconds. Compare by `wrapping_sub`.
#[cfg(not(target_arch = "x86_64"))]
pub fn now() -> u64 {
    use std::sync::OnceLock;
    use std::time::Instant;

    static START: OnceLock<Instant> = OnceLock::new();
    u64::try_from(START.get_or_init(Instant::now).elapsed().as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_goes_on() {
        let start = now();
        while now() == start {
            std::hint::spin_loop();
        }
    }
}
