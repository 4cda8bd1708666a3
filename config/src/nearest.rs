//! The known word an unknown one was meant to be.

/// Returns the member of `known` that `word` most likely misspells, if one is close enough to suggest.
///
/// Close is one slip in three letters. Case and `_` for `-` do not count as slips.
pub fn nearest<'a>(word: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let word = word.to_ascii_lowercase().replace('_', "-");
    known
        .into_iter()
        .map(|candidate| {
            (
                strsim::damerau_levenshtein(&word, &candidate.to_ascii_lowercase()),
                candidate,
            )
        })
        .filter(|(slips, candidate)| *slips <= (candidate.len() / 3).max(1))
        .min_by_key(|(slips, _)| *slips)
        .map(|(_, candidate)| candidate)
}

#[cfg(test)]
mod tests {
    use super::nearest;

    const KEYS: [&str; 4] = ["socket-path", "socket-mode", "mtu", "fd"];

    #[test]
    fn a_slip_finds_the_word_that_was_meant() {
        assert_eq!(nearest("socketpath", KEYS), Some("socket-path"));
        assert_eq!(nearest("Socket_Mode", KEYS), Some("socket-mode"));
        assert_eq!(nearest("mut", KEYS), Some("mtu"));
    }

    #[test]
    fn a_stranger_finds_nothing() {
        assert_eq!(nearest("colour", KEYS), None);
        assert_eq!(nearest("", KEYS), None);
        assert_eq!(nearest("fd", []), None);
    }
}
