//! The README tells the truth about where things are.

use std::path::Path;

#[test]
fn every_path_of_the_where_table_exists() {
    let top = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the top of the checkout");
    let readme = std::fs::read_to_string(top.join("README.md")).expect("README.md");
    let table = readme.split("## Where is …?").nth(1).expect("the table").split("\n## ").next();
    let rows = table.unwrap_or_default().lines().filter(|line| line.starts_with("| "));
    // The first row is the table's head.
    let paths: Vec<&str> = rows
        .skip(1)
        .filter_map(|row| row.split('|').nth(2))
        .flat_map(|cell| cell.split('`').skip(1).step_by(2))
        .collect();
    assert!(paths.len() > 10, "{paths:?}");
    for path in paths {
        assert!(top.join(path).exists(), "README.md names {path}, which is not there");
    }
}
