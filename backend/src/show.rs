//! Answers of a running process, for people: what was changed, and maps as a table and a drawing.
//!
//! ```text
//! control socket ──JSON──▶ answer ──▶ a line, or for each map: header, table of extents, IOVA space in order
//! ```
//!
//! Drawn by whoever asked, from the report that `--json` prints. What an older process does not report is left out.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::ops::RangeInclusive;

use serde::Deserialize;
use serde_json::Value;

/// What a process answers, as far as it is drawn.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
enum Answer {
    Maps { maps: Vec<Map> },
    Change { changed: bool, text: String },
}

#[derive(Debug, Deserialize)]
struct Map {
    name: String,
    iommu: String,
    usable: Vec<String>,
    mapped_bytes: u64,
    pinned_bytes: u64,
    devices: Vec<String>,
    extents: Vec<Extent>,
    discards: Option<u64>,
}

#[derive(Debug, Deserialize)]
struct Extent {
    iova: String,
    len: u64,
    file: String,
    file_offset: u64,
    by: String,
    owners: Vec<String>,
    /// Bytes by page size, `4K`, `2M` and so on.
    #[serde(default)]
    page_sizes: BTreeMap<String, u64>,
}

/// Returns the lines to print for an answer to a command.
///
/// # Errors
///
/// If the answer is none that is known: the process is of another version.
pub fn answer(answer: &Value) -> Result<String, serde_json::Error> {
    Ok(match Answer::deserialize(answer)? {
        Answer::Change { changed: true, text } => format!("{text}\n"),
        Answer::Change { text, .. } => format!("nothing to change: {text}\n"),
        Answer::Maps { maps } if maps.is_empty() => "there is no map\n".to_owned(),
        Answer::Maps { maps } => maps.iter().map(draw).collect::<Vec<_>>().join("\n"),
    })
}

fn draw(map: &Map) -> String {
    let mut text = header(map);
    if !map.extents.is_empty() {
        text.push('\n');
        text += &columns(&table(map));
    }
    text.push('\n');
    text += &columns(&space(map));
    text
}

fn header(map: &Map) -> String {
    let devices = match map.devices.as_slice() {
        [] => "no device".to_owned(),
        [one] => format!("device {one}"),
        more => format!("devices {}", more.join(", ")),
    };
    let (mapped, pinned) = (size(map.mapped_bytes), size(map.pinned_bytes));
    let mut text = format!(
        "map {}: {}, {mapped} mapped, {pinned} pinned, {devices}\n",
        map.name, map.iommu
    );
    if let Some(discards) = map.discards.filter(|discards| *discards > 0) {
        // Writing to a String does not fail.
        let _ = writeln!(
            text,
            "{discards} extents were mapped anew, as pages had been discarded behind them"
        );
    }
    text
}

fn table(map: &Map) -> Vec<Vec<String>> {
    let titles = ["iova", "size", "pages", "file", "offset", "by", "owners"];
    let mut rows = vec![titles.map(str::to_owned).to_vec()];
    rows.extend(map.extents.iter().map(|extent| {
        vec![
            extent
                .range()
                .map_or_else(|| extent.iova.clone(), |range| shown(&range)),
            size(extent.len),
            extent.pages(),
            extent.file.clone(),
            format!("{:#x}", extent.file_offset),
            extent.by.clone(),
            extent.owners.join(", "),
        ]
    }));
    rows
}

/// The whole IOVA space in order, a row for each stretch: what is mapped, what is free, what cannot be used.
fn space(map: &Map) -> Vec<Vec<String>> {
    let row = |mark: &str, what: &str, range: &RangeInclusive<u64>, owners: String| {
        vec![format!("{mark} {what}"), shown(range), size_of(range), owners]
    };
    let mut mapped: Vec<(RangeInclusive<u64>, &Extent)> = map
        .extents
        .iter()
        .filter_map(|extent| Some((extent.range()?, extent)))
        .collect();
    mapped.sort_by_key(|(range, _)| *range.start());
    let mut mapped = mapped.into_iter().peekable();
    let mut usable: Vec<RangeInclusive<u64>> = map.usable.iter().filter_map(|range| parse(range)).collect();
    usable.sort_by_key(|range| *range.start());

    let mut rows = Vec::new();
    let mut after_last: Option<u64> = None;
    for range in usable {
        if let Some(hole) = after_last.and_then(|start| gap(start, *range.start())) {
            rows.push(row("x", "reserved", &hole, String::new()));
        }
        rows.push(row("-", "usable", &range, String::new()));
        let mut at = Some(*range.start());
        while let Some((extent, of)) = mapped.next_if(|(extent, _)| extent.start() <= range.end()) {
            if let Some(free) = at.and_then(|at| gap(at, *extent.start())) {
                rows.push(row(".", "free", &free, String::new()));
            }
            rows.push(row("#", "mapped", &extent, of.owners.join(", ")));
            at = extent.end().checked_add(1);
        }
        if let Some(free) = at.filter(|at| at <= range.end()) {
            rows.push(row(".", "free", &(free..=*range.end()), String::new()));
        }
        after_last = range.end().checked_add(1);
    }
    // None, unless ranges and extents were reported at two moments.
    for (extent, of) in mapped {
        rows.push(row("#", "mapped", &extent, of.owners.join(", ")));
    }
    rows
}

impl Extent {
    fn range(&self) -> Option<RangeInclusive<u64>> {
        let start = number(&self.iova)?;
        let last = self.len.checked_sub(1)?;
        Some(start..=start.checked_add(last)?)
    }

    /// Bytes by page size, the largest first.
    fn pages(&self) -> String {
        let mut pages: Vec<(&String, &u64)> = self.page_sizes.iter().collect();
        pages.sort_by_key(|(page, _)| std::cmp::Reverse(page_bytes(page)));
        let shown = pages
            .iter()
            .map(|(page, bytes)| format!("{page}:{}", size(**bytes).replace(' ', "")));
        shown.collect::<Vec<_>>().join(" ")
    }
}

fn page_bytes(page: &str) -> u64 {
    let (digits, shift) = match page.as_bytes().last() {
        Some(b'K') => (page.trim_end_matches('K'), 10),
        Some(b'M') => (page.trim_end_matches('M'), 20),
        Some(b'G') => (page.trim_end_matches('G'), 30),
        _ => (page, 0),
    };
    digits
        .parse::<u64>()
        .map_or(0, |count| count.saturating_mul(1 << shift))
}

/// What lies from `start` on and before `end`, if anything does.
fn gap(start: u64, end: u64) -> Option<RangeInclusive<u64>> {
    (start < end).then(|| start..=end - 1)
}

fn parse(range: &str) -> Option<RangeInclusive<u64>> {
    let (start, end) = range.split_once('-')?;
    Some(number(start)?..=number(end)?)
}

fn number(text: &str) -> Option<u64> {
    u64::from_str_radix(text.strip_prefix("0x")?, 16).ok()
}

fn shown(range: &RangeInclusive<u64>) -> String {
    format!("{:#x}-{:#x}", range.start(), range.end())
}

fn size_of(range: &RangeInclusive<u64>) -> String {
    // 2^64 bytes do not fit; nobody sees one in so many.
    size((range.end() - range.start()).saturating_add(1))
}

/// Bytes in the largest unit of which there is one: whole where they are, else with two digits.
fn size(bytes: u64) -> String {
    const UNITS: [(&str, u32); 4] = [("TiB", 40), ("GiB", 30), ("MiB", 20), ("KiB", 10)];
    let Some((unit, shift)) = UNITS.iter().find(|(_, shift)| bytes >> shift > 0) else {
        return format!("{bytes} B");
    };
    let (whole, rest) = (bytes >> shift, bytes & ((1 << shift) - 1));
    if rest == 0 {
        return format!("{whole} {unit}");
    }
    let hundredths = (u128::from(rest) * 100) >> shift;
    format!("{whole}.{hundredths:02} {unit}")
}

/// Rows with their cells under each other. A column with nothing in it is left out.
fn columns(rows: &[Vec<String>]) -> String {
    let count = rows.iter().map(Vec::len).max().unwrap_or(0);
    let cell = |row: &[String], column: usize| row.get(column).cloned().unwrap_or_default();
    let widths: Vec<usize> = (0..count)
        .map(|column| {
            let cells = rows.iter().map(|row| cell(row, column).chars().count());
            cells.max().unwrap_or(0)
        })
        .collect();
    let mut text = String::new();
    for row in rows {
        let cells = widths.iter().enumerate().filter(|(_, width)| **width > 0);
        let line: Vec<String> = cells
            .map(|(column, width)| format!("{:<width$}", cell(row, column)))
            .collect();
        text += "  ";
        text += line.join("  ").trim_end();
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn report() -> Value {
        json!({
            "name": "main",
            "iommu": "iommufd",
            "usable": ["0x1000-0xfedfffff", "0xfef00000-0x7fffffffff"],
            "mapped_bytes": 0x4000_0000_u64 + 0x4000,
            "pinned_bytes": 0x4000_0000_u64 + 0x4000,
            "devices": ["0000:01:00.0", "0000:02:00.0"],
            "extents": [
                {
                    "iova": "0x1000", "len": 0x4000, "file": "/memfd:vuv-rings", "file_offset": 0, "by": "file",
                    "owners": ["0000:01:00.0"]
                },
                {
                    "iova": "0x40000000", "len": 0x4000_0000_u64, "file": "/memfd:guest", "file_offset": 0x4000_0000_u64,
                    "by": "address", "owners": ["vm0", "vm1"]
                },
            ],
        })
    }

    fn drawn(map: Value) -> String {
        answer(&json!({ "maps": [map] })).unwrap()
    }

    #[test]
    fn a_map_is_a_header_a_table_and_its_space_in_order() {
        let wanted = "\
map main: iommufd, 1.00 GiB mapped, 1.00 GiB pinned, devices 0000:01:00.0, 0000:02:00.0

  iova                   size    pages  file              offset      by       owners
  0x1000-0x4fff          16 KiB         /memfd:vuv-rings  0x0         file     0000:01:00.0
  0x40000000-0x7fffffff  1 GiB          /memfd:guest      0x40000000  address  vm0, vm1

  - usable    0x1000-0xfedfffff        3.98 GiB
  # mapped    0x1000-0x4fff            16 KiB       0000:01:00.0
  . free      0x5000-0x3fffffff        1023.98 MiB
  # mapped    0x40000000-0x7fffffff    1 GiB        vm0, vm1
  . free      0x80000000-0xfedfffff    1.98 GiB
  x reserved  0xfee00000-0xfeefffff    1 MiB
  - usable    0xfef00000-0x7fffffffff  508.01 GiB
  . free      0xfef00000-0x7fffffffff  508.01 GiB
";
        assert_eq!(drawn(report()), wanted);
    }

    #[test]
    fn page_sizes_are_shown_largest_first_where_they_are_known() {
        let mut map = report();
        map["extents"][1]["page_sizes"] = json!({ "4K": 8192, "1G": 0x4000_0000_u64, "2M": 64 << 20 });
        let text = drawn(map);
        let line = text.lines().find(|line| line.contains("/memfd:guest")).unwrap();
        assert!(line.contains("1G:1GiB 2M:64MiB 4K:8KiB"), "{line}");
    }

    #[test]
    fn discards_are_told_when_there_were_some() {
        let mut map = report();
        map["discards"] = json!(0);
        assert!(!drawn(map.clone()).contains("discarded"));
        map["discards"] = json!(3);
        assert!(
            drawn(map).contains("\n3 extents were mapped anew, as pages had been discarded behind them\n")
        );
    }

    #[test]
    fn an_empty_map_is_all_free() {
        let mut map = report();
        for list in ["extents", "devices"] {
            map[list] = json!([]);
        }
        map["usable"] = json!(["0x0-0xffffffffffffffff"]);
        map["mapped_bytes"] = json!(0);
        map["pinned_bytes"] = json!(0);
        let wanted = "\
map main: iommufd, 0 B mapped, 0 B pinned, no device

  - usable  0x0-0xffffffffffffffff  16777215.99 TiB
  . free    0x0-0xffffffffffffffff  16777215.99 TiB
";
        assert_eq!(drawn(map), wanted);
    }

    #[test]
    fn an_extent_at_the_ends_of_a_range_leaves_no_gap_there() {
        let mut map = report();
        map["usable"] = json!(["0x1000-0x4fff", "0x40000000-0x7fffffff"]);
        let text = drawn(map);
        assert!(!text.contains("free"), "{text}");
        assert!(text.contains("x reserved  0x5000-0x3fffffff"), "{text}");
    }

    #[test]
    fn a_change_is_a_line() {
        let change = |changed| answer(&json!({ "changed": changed, "text": "map x exists" })).unwrap();
        assert_eq!(change(true), "map x exists\n");
        assert_eq!(change(false), "nothing to change: map x exists\n");
        assert_eq!(answer(&json!({ "maps": [] })).unwrap(), "there is no map\n");
        assert!(answer(&json!("what")).is_err());
    }

    #[test]
    fn sizes_are_in_the_largest_unit() {
        for (bytes, text) in [
            (0, "0 B"),
            (1023, "1023 B"),
            (1024, "1 KiB"),
            (1536, "1.50 KiB"),
            ((1 << 30) - 1, "1023.99 MiB"),
            (u64::MAX, "16777215.99 TiB"),
        ] {
            assert_eq!(size(bytes), text);
        }
    }
}
