//! A TOML table that knows its path and lines, so that whatever is wrong in it can be pointed at.
//!
//! serde's data model carries neither: by the time it refuses a key, the path to it is gone. So the file is
//! read from the parsed tree, where each key and value still has its place in the text.

use std::fmt;
use std::ops::Range;

use toml::Spanned;
use toml::de::{DeInteger, DeTable, DeValue};

use crate::check::ConfigError;
use crate::nearest::nearest;
use crate::value::ValueError;

/// What is wrong in a configuration file, with the key's full path and line.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FileError {
    /// The text is not TOML.
    #[error("line {line}, column {column} is not TOML: {problem}")]
    Syntax {
        /// Counted from 1.
        line: usize,
        /// Characters, counted from 1.
        column: usize,
        /// What the TOML parser said.
        problem: String,
    },
    /// A key that means nothing where it stands.
    #[error("unknown key `{key}` at line {line}{hint}")]
    UnknownKey {
        /// Its full path.
        key: String,
        /// Where it stands.
        line: usize,
        /// What may have been meant.
        hint: KeyHint,
    },
    /// A key that must be there and is not.
    #[error("`{table}` at line {line} has no `{key}`")]
    MissingKey {
        /// Path of the table that lacks it.
        table: String,
        /// Where the table begins.
        line: usize,
        /// What it lacks.
        key: &'static str,
    },
    /// A value of another type than the key takes.
    #[error("`{key}` at line {line} is a TOML {found}; wanted {wanted}")]
    Type {
        /// Its full path.
        key: String,
        /// Where it stands.
        line: usize,
        /// What TOML calls the value.
        found: &'static str,
        /// What the key takes.
        wanted: &'static str,
    },
    /// A value of the right type that cannot be taken.
    #[error("`{key}` at line {line} is refused")]
    Value {
        /// Its full path.
        key: String,
        /// Where it stands.
        line: usize,
        /// Why not.
        source: ValueError,
    },
    /// A port with no socket, or with two.
    #[error("`{port}` at line {line} has {found} of `socket-path` and `fd`; a port has exactly one of them")]
    Socket {
        /// Path of the port's table.
        port: String,
        /// Where the table begins.
        line: usize,
        /// `both` or `neither`.
        found: &'static str,
    },
    /// A key that another key of the same table makes meaningless.
    #[error("`{key}` at line {line} has no meaning beside `{beside}`: {why}")]
    Meaningless {
        /// Its full path.
        key: String,
        /// Where it stands.
        line: usize,
        /// The other key.
        beside: &'static str,
        /// What the other key already decides.
        why: &'static str,
    },
    /// The keys are right one by one and contradict each other.
    #[error(transparent)]
    Contradiction(#[from] ConfigError),
}

/// What may have been meant by an unknown key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum KeyHint {
    /// A key known in this table that is spelled nearly so.
    Nearest(&'static str),
    /// The key exists in another place, which is named.
    Elsewhere(&'static str),
    /// Nothing comes near: all keys known in this table.
    Known(&'static [&'static str]),
}

impl fmt::Display for KeyHint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Nearest(key) => write!(f, ", did you mean `{key}`?"),
            Self::Elsewhere(place) => write!(f, ", which belongs {place}"),
            Self::Known(keys) => write!(f, "; known here are {}", keys.join(", ")),
        }
    }
}

/// The keys of one kind of table, and where such a table stands in the file.
pub(crate) struct Place {
    pub(crate) keys: &'static [&'static str],
    pub(crate) wording: &'static str,
}

/// Parses `text` and hands its top table to `read`.
pub(crate) fn read_document<T>(
    text: &str,
    read: impl FnOnce(&Section<'_>) -> Result<T, FileError>,
) -> Result<T, FileError> {
    let lines = Lines::of(text);
    let document = DeTable::parse(text).map_err(|error| {
        let (line, column) = lines.position(text, error.span().map_or(0, |span| span.start));
        // The parser's message may run over several lines, ours go into one line of a log.
        let problem = error.message().lines().collect::<Vec<_>>().join(", ");
        FileError::Syntax {
            line,
            column,
            problem,
        }
    })?;
    read(&Section {
        key: String::new(),
        line: 1,
        table: document.get_ref(),
        lines: &lines,
    })
}

/// One table of the file.
pub(crate) struct Section<'a> {
    /// Full path; empty for the top of the file.
    pub(crate) key: String,
    pub(crate) line: usize,
    table: &'a DeTable<'a>,
    lines: &'a Lines,
}

impl<'a> Section<'a> {
    /// Refuses the first key that `place` does not have, with a hint taken from all `places`.
    pub(crate) fn expect_keys(
        &self,
        place: &'static Place,
        places: &'static [Place],
    ) -> Result<(), FileError> {
        let Some(entry) = self
            .entries()
            .into_iter()
            .find(|entry| !place.keys.contains(&entry.name))
        else {
            return Ok(());
        };
        let elsewhere = places.iter().find(|place| place.keys.contains(&entry.name));
        let hint = match (elsewhere, nearest(entry.name, place.keys.iter().copied())) {
            (Some(place), _) => KeyHint::Elsewhere(place.wording),
            (None, Some(key)) => KeyHint::Nearest(key),
            (None, None) => KeyHint::Known(place.keys),
        };
        Err(FileError::UnknownKey {
            key: entry.key,
            line: entry.line,
            hint,
        })
    }

    /// Everything in the table, in the file's order.
    pub(crate) fn entries(&self) -> Vec<Entry<'a>> {
        let mut entries: Vec<_> = self.table.iter().collect();
        entries.sort_by_key(|(name, _)| name.span().start);
        entries
            .into_iter()
            .map(|(name, value)| self.entry(name.get_ref(), &name.span(), value))
            .collect()
    }

    pub(crate) fn get(&self, key: &str) -> Option<Entry<'a>> {
        let (name, value) = self.table.get_key_value(key)?;
        Some(self.entry(name.get_ref(), &name.span(), value))
    }

    pub(crate) fn require(&self, key: &'static str) -> Result<Entry<'a>, FileError> {
        self.get(key).ok_or_else(|| FileError::MissingKey {
            table: self.key.clone(),
            line: self.line,
            key,
        })
    }

    fn entry(&self, name: &'a str, span: &Range<usize>, value: &'a Spanned<DeValue<'a>>) -> Entry<'a> {
        let shown = if is_bare_key(name) {
            name.to_owned()
        } else {
            format!("{name:?}")
        };
        let key = if self.key.is_empty() {
            shown
        } else {
            format!("{}.{shown}", self.key)
        };
        Entry {
            key,
            name,
            line: self.lines.line_at(span.start),
            value,
            lines: self.lines,
        }
    }
}

/// One key of a table, or one element of an array, with its value.
pub(crate) struct Entry<'a> {
    /// Full path.
    key: String,
    /// Last part of the path, as it was meant, without quotes.
    pub(crate) name: &'a str,
    line: usize,
    value: &'a Spanned<DeValue<'a>>,
    lines: &'a Lines,
}

impl<'a> Entry<'a> {
    /// Reads a string's text.
    pub(crate) fn string<T>(
        &self,
        parse: impl FnOnce(&str) -> Result<T, ValueError>,
    ) -> Result<T, FileError> {
        match self.value.get_ref() {
            DeValue::String(text) => self.take(parse(text)),
            _ => Err(self.wrong_type("a string")),
        }
    }

    /// Reads an integer, put in decimal.
    pub(crate) fn integer<T>(
        &self,
        parse: impl FnOnce(&str) -> Result<T, ValueError>,
    ) -> Result<T, FileError> {
        match self.value.get_ref() {
            DeValue::Integer(number) => self.take(parse(&decimal(number))),
            _ => Err(self.wrong_type("an integer")),
        }
    }

    /// Reads an integer, put in decimal, or a string's text.
    pub(crate) fn integer_or_string<T>(
        &self,
        wanted: &'static str,
        parse: impl FnOnce(&str) -> Result<T, ValueError>,
    ) -> Result<T, FileError> {
        match self.value.get_ref() {
            DeValue::String(_) => self.string(parse),
            DeValue::Integer(_) => self.integer(parse),
            _ => Err(self.wrong_type(wanted)),
        }
    }

    /// Reads permission bits: a string of octal digits, or an integer that TOML marks as octal.
    pub(crate) fn octal<T>(&self, parse: impl FnOnce(&str) -> Result<T, ValueError>) -> Result<T, FileError> {
        match self.value.get_ref() {
            DeValue::String(_) => self.string(parse),
            DeValue::Integer(number) if number.radix() == 8 => self.take(parse(number.as_str())),
            DeValue::Integer(number) => self.take(Err(ValueError::ModeDecimal {
                number: decimal(number),
            })),
            _ => Err(self.wrong_type("an octal integer (0o660) or a string (\"0660\")")),
        }
    }

    pub(crate) fn boolean(&self) -> Result<bool, FileError> {
        self.value
            .get_ref()
            .as_bool()
            .ok_or_else(|| self.wrong_type("true or false"))
    }

    /// The array's elements, or nothing if it is no array.
    pub(crate) fn elements(&self) -> Option<Vec<Entry<'a>>> {
        let element = |(index, value): (usize, &'a Spanned<DeValue<'a>>)| Entry {
            key: format!("{}[{index}]", self.key),
            name: self.name,
            line: self.lines.line_at(value.span().start),
            value,
            lines: self.lines,
        };
        Some(
            self.value
                .get_ref()
                .as_array()?
                .iter()
                .enumerate()
                .map(element)
                .collect(),
        )
    }

    /// The table that is the value.
    pub(crate) fn section(&self, wanted: &'static str) -> Result<Section<'a>, FileError> {
        let table = self
            .value
            .get_ref()
            .as_table()
            .ok_or_else(|| self.wrong_type(wanted))?;
        Ok(Section {
            key: self.key.clone(),
            line: self.line,
            table,
            lines: self.lines,
        })
    }

    /// Puts the key's path and line around what is wrong with its value.
    pub(crate) fn take<T>(&self, value: Result<T, ValueError>) -> Result<T, FileError> {
        value.map_err(|source| FileError::Value {
            key: self.key.clone(),
            line: self.line,
            source,
        })
    }

    pub(crate) fn wrong_type(&self, wanted: &'static str) -> FileError {
        let found = self.value.get_ref().type_str();
        FileError::Type {
            key: self.key.clone(),
            line: self.line,
            found,
            wanted,
        }
    }

    pub(crate) fn meaningless(&self, beside: &'static str, why: &'static str) -> FileError {
        FileError::Meaningless {
            key: self.key.clone(),
            line: self.line,
            beside,
            why,
        }
    }
}

/// The number in decimal; as it was written if it is too large for any setting.
fn decimal(number: &DeInteger<'_>) -> String {
    match i128::from_str_radix(number.as_str(), number.radix()) {
        Ok(value) => value.to_string(),
        Err(_) => number.to_string(),
    }
}

fn is_bare_key(name: &str) -> bool {
    !name.is_empty()
        && name
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_')
}

/// Where each line of a text begins.
struct Lines {
    starts: Vec<usize>,
}

impl Lines {
    fn of(text: &str) -> Self {
        let after_breaks = text
            .bytes()
            .enumerate()
            .filter(|(_, byte)| *byte == b'\n')
            .map(|(at, _)| at + 1);
        Self {
            starts: std::iter::once(0).chain(after_breaks).collect(),
        }
    }

    /// The line, counted from 1, of a byte.
    fn line_at(&self, offset: usize) -> usize {
        self.starts.partition_point(|start| *start <= offset)
    }

    /// The line and column, counted from 1, of a byte.
    fn position(&self, text: &str, offset: usize) -> (usize, usize) {
        let line = self.line_at(offset);
        let start = self.starts.get(line - 1).copied().unwrap_or(0);
        let before = text.get(start..offset).map_or(0, |before| before.chars().count());
        (line, before + 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_and_columns_count_from_1() {
        let text = "a\n\nbéc\n";
        let lines = Lines::of(text);
        assert_eq!(lines.position(text, 0), (1, 1));
        assert_eq!(lines.position(text, 2), (2, 1));
        assert_eq!(lines.position(text, 6), (3, 3));
        assert_eq!(lines.position(text, text.len()), (4, 1));
    }

    #[test]
    fn a_key_that_needs_quotes_is_shown_with_them() {
        read_document("[port.\"a.b\\n\"]\nx = 1", |top| {
            let port = top.require("port")?.section("")?;
            assert_eq!(port.entries()[0].key, r#"port."a.b\n""#);
            assert_eq!(port.entries()[0].name, "a.b\n");
            Ok(())
        })
        .unwrap();
    }

    #[test]
    fn a_huge_number_is_shown_as_it_was_written() {
        let digits = "9".repeat(60);
        read_document(&format!("a = {digits}\nb = 0xff\nc = -0_1_7"), |_| Ok(())).unwrap_err();
        read_document(&format!("a = {digits}\nb = 0xff\nc = -1_7"), |top| {
            for (key, shown) in [("a", digits.as_str()), ("b", "255"), ("c", "-17")] {
                top.require(key)?.integer(|text| {
                    assert_eq!(text, shown);
                    Ok(())
                })?;
            }
            Ok(())
        })
        .unwrap();
    }
}
