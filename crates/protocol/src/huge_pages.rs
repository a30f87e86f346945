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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn page_sizes_are_read_as_cgroups_write_them() {
        assert_eq!([page_kib("64KB"), page_kib("2MB"), page_kib("1GB")], [Some(64), Some(2048), Some(1 << 20)]);
        assert_eq!([page_kib("2"), page_kib("MB"), page_kib("2TB"), page_kib("")], [None; 4]);
    }
}
