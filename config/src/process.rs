//! Settings of the process as a whole: its log and its workers' CPUs.

use std::fmt;
use std::str::FromStr;

use clap::ValueEnum;

use crate::value::{self, ValueError};

/// Highest CPU number the kernel's fixed-size affinity mask holds (`CPU_SETSIZE` is 1024).
pub(crate) const CPU_MOST: u16 = 1023;

/// The least severe log lines that are still written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub enum LogLevel {
    /// What failed and stays failed.
    Error,
    /// What was refused, retried or works worse than it could.
    Warn,
    /// What the process chose and why, connections coming and going.
    Info,
    /// Every message and change of state.
    Debug,
    /// More than an operator wants.
    Trace,
}

impl LogLevel {
    /// Returns the word by which flags, files and log filters know the level.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Error => "error",
            Self::Warn => "warn",
            Self::Info => "info",
            Self::Debug => "debug",
            Self::Trace => "trace",
        }
    }
}

impl fmt::Display for LogLevel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// A CPU by the kernel's number, 0 to 1023. Whether this machine has it is for the worker to find.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Cpu(pub u16);

/// A list as the command line writes it: `2,3`, `2-3`, `0,4-6`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct CpuList(pub(crate) Vec<Cpu>);

impl FromStr for CpuList {
    type Err = ValueError;

    fn from_str(text: &str) -> Result<Self, ValueError> {
        let mut list = Self(Vec::new());
        for part in text.split(',') {
            let (first, last) = part.split_once('-').unwrap_or((part, part));
            if value::digits(first).is_none() || value::digits(last).is_none() {
                return Err(ValueError::Cpus {
                    text: text.to_owned(),
                });
            }
            let (first, last) = (cpu(first)?.0, cpu(last)?.0);
            if first > last {
                return Err(ValueError::CpuRange { first, last });
            }
            for number in first..=last {
                list.push(Cpu(number))?;
            }
        }
        Ok(list)
    }
}

impl CpuList {
    /// Adds one CPU, which must be new to the list.
    pub(crate) fn push(&mut self, cpu: Cpu) -> Result<(), ValueError> {
        if self.0.contains(&cpu) {
            return Err(ValueError::CpuTwice { cpu: cpu.0 });
        }
        self.0.push(cpu);
        Ok(())
    }
}

/// Reads one CPU number.
pub(crate) fn cpu(text: &str) -> Result<Cpu, ValueError> {
    let most = u32::from(CPU_MOST);
    let number = value::number(text, 0, most)?;
    u16::try_from(number).map(Cpu).map_err(|_| ValueError::Number {
        text: text.to_owned(),
        least: 0,
        most,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cpus(text: &str) -> Result<Vec<u16>, String> {
        let list: CpuList = text.parse().map_err(|error: ValueError| error.to_string())?;
        Ok(list.0.iter().map(|cpu| cpu.0).collect())
    }

    #[test]
    fn numbers_and_ranges_mix() {
        assert_eq!(cpus("2,3"), Ok(vec![2, 3]));
        assert_eq!(cpus("2-3"), Ok(vec![2, 3]));
        assert_eq!(cpus("9,0,4-6,7-7"), Ok(vec![9, 0, 4, 5, 6, 7]));
        assert_eq!(cpus("0-1023").unwrap().len(), 1024);
    }

    #[test]
    fn a_bad_list_says_what_is_wrong() {
        for text in ["", "2,", "2-", "-3", "a", "2 ,3", "1-2-3", "+1"] {
            assert_eq!(
                cpus(text).unwrap_err(),
                format!("`{text}` is not a list of CPUs; wanted numbers and ranges such as 2,3 or 2-3")
            );
        }
        assert_eq!(cpus("3-2").unwrap_err(), "CPU range 3-2 runs backwards");
        assert_eq!(
            cpus("1024").unwrap_err(),
            "`1024` is not a whole number from 0 to 1023"
        );
        assert_eq!(
            cpus("0-3,2").unwrap_err(),
            "CPU 2 is listed twice, and would run two workers that poll in turns"
        );
    }
}
