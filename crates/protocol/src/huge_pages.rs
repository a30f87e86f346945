//! Sizes of huge pages as the OCI runtime specification writes them (config-linux.md, Huge page limits): "2MB".

/// KiB of a page size; `None` for what is not one.
pub fn page_kib(size: &str) -> Option<u64> {
    let (digits, unit) = size.split_at_checked(size.find(|c: char| !c.is_ascii_digit())?)?;
    let shift = match unit {
        "KB" => 0,
        "MB" => 10,
        "GB" => 20,
        _ => return None,
    };
    digits.parse::<u64>().ok()?.checked_mul(1 << shift)
}

/// The name of a page size in KiB, in the largest unit of which it is a multiple.
pub fn page_name(kib: u64) -> String {
    match kib {
        kib if kib.is_multiple_of(1 << 20) => format!("{}GB", kib >> 20),
        kib if kib.is_multiple_of(1 << 10) => format!("{}MB", kib >> 10),
        kib => format!("{kib}KB"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn page_sizes_are_read_as_cgroups_write_them() {
        assert_eq!([page_kib("64KB"), page_kib("2MB"), page_kib("1GB")], [Some(64), Some(2048), Some(1 << 20)]);
        assert_eq!([page_kib("2"), page_kib("MB"), page_kib("2TB"), page_kib("")], [None; 4]);
    }

    #[test]
    fn names_of_page_sizes_are_what_is_read() {
        for name in ["64KB", "2MB", "16MB", "1GB", "16GB"] {
            assert_eq!(page_kib(name).map(page_name).as_deref(), Some(name));
        }
    }
}
