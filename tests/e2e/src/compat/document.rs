//! The table of differences in docs/compatibility.md, which lists exactly those of the suite's table.

use super::Group;

/// Begins the generated part of the document.
pub const BEGIN: &str = "<!-- compat: made by `bulkhead-compat --document`; a test compares -->";
/// Ends it.
pub const END: &str = "<!-- compat: end -->";

/// The differences of the table, as Markdown.
pub fn table(groups: &[Group]) -> String {
    let mut text = String::from("| area | what | why |\n| --- | --- | --- |\n");
    for case in groups.iter().flat_map(Group::cases) {
        if let Some(reason) = case.difference {
            text.push_str(&format!("| {} | {} | {reason} |\n", case.area.name(), case.name));
        }
    }
    text
}

/// The generated part of a document.
pub fn part(document: &str) -> Option<&str> {
    document.split_once(BEGIN)?.1.split_once(END).map(|(part, _)| part.trim())
}

#[cfg(test)]
mod tests {
    use super::super::cases;
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn document_lists_exactly_the_differences_of_the_table() {
        let document = include_str!("../../../../docs/compatibility.md");
        assert_eq!(part(document), Some(table(&cases::groups()).trim()), "run `bulkhead-compat --document`");
    }

    #[test]
    fn names_are_unique() {
        let groups = cases::groups();
        let mut seen = HashSet::new();
        for case in groups.iter().flat_map(Group::cases) {
            assert!(seen.insert(case.name), "two cases are called {:?}", case.name);
        }
        assert!(groups.iter().map(|group| group.name).collect::<HashSet<_>>().len() == groups.len());
    }
}
