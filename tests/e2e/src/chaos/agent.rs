//! Killing the agent, which is the guest's init: no process in the guest can, so its program is overwritten in the guest's
//! memory, from the host. It dies at its next instruction, whatever it does, and the guest's kernel with it.

use std::collections::HashMap;
use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;

use anyhow::{Context, Result, ensure};

/// The guest image, uncompressed.
const IMAGE: &str = "/run/node/lib/initramfs.cpio";
const PAGE: usize = 4096;
/// `hlt`, which no process may execute.
const NONSENSE: [u8; PAGE] = [0xf4; PAGE];
/// Mappings of a VMM that may be a guest's memory: what is smaller is the VMM's own.
const LEAST: u64 = 32 << 20;
/// How much of a mapping is looked at: boot memory comes first.
const MOST: u64 = 512 << 20;
/// proc_pid_pagemap(5).
const PRESENT: u64 = 1 << 63;

/// The pages of the agent's program that are executed, by their first 16 bytes.
struct Text {
    image: Vec<u8>,
    pages: HashMap<[u8; 16], Vec<usize>>,
}

impl Text {
    fn read() -> Result<Self> {
        let image = fs::read(IMAGE).with_context(|| format!("cannot read {IMAGE}"))?;
        let begin = image.windows(4).position(|bytes| bytes == b"\x7fELF").context("no program in the image")?;
        let mut pages: HashMap<_, Vec<usize>> = HashMap::new();
        for (offset, size) in executable(image.get(begin..).unwrap_or_default())? {
            // Whole pages only: what surrounds a part of one differs in memory.
            for page in
                (offset.next_multiple_of(PAGE)..offset + size).step_by(PAGE).filter(|at| at + PAGE <= offset + size)
            {
                if let Some(key) = image.get(begin + page..).and_then(|rest| rest.first_chunk()) {
                    pages.entry(*key).or_default().push(begin + page);
                }
            }
        }
        ensure!(!pages.is_empty(), "the agent has no page that is executed");
        Ok(Self { image, pages })
    }

    fn holds(&self, page: &[u8]) -> bool {
        let Some(places) = page.first_chunk().and_then(|key| self.pages.get(key)) else { return false };
        places.iter().any(|&place| self.image.get(place..place + PAGE) == Some(page))
    }
}

/// Offsets and sizes of the loaded segments of an ELF file that are executed (elf(5)).
fn executable(elf: &[u8]) -> Result<Vec<(usize, usize)>> {
    let number = |at: usize, size: usize| -> Result<usize> {
        let mut bytes = [0; 8];
        bytes[..size].copy_from_slice(elf.get(at..at + size).context("the agent's program is cut off")?);
        Ok(usize::try_from(u64::from_le_bytes(bytes))?)
    };
    let (table, entry, count) = (number(32, 8)?, number(54, 2)?, number(56, 2)?);
    let mut segments = Vec::new();
    for at in (0..count).map(|index| table + index * entry) {
        let (kind, flags) = (number(at, 4)?, number(at + 4, 4)?);
        if kind == 1 && flags & 1 != 0 {
            segments.push((number(at + 8, 8)?, number(at + 32, 8)?));
        }
    }
    Ok(segments)
}

/// Overwrites the agent's program in the memory of the guest that a VMM runs. The VMM should be stopped.
pub fn overwrite(vmm: u32) -> Result<()> {
    let text = Text::read()?;
    let maps = fs::read_to_string(format!("/proc/{vmm}/maps")).context("the VMM is gone")?;
    let memory = OpenOptions::new().read(true).write(true).open(format!("/proc/{vmm}/mem"))?;
    let pagemap = File::open(format!("/proc/{vmm}/pagemap"))?;
    let mut overwritten = 0;
    for line in maps.lines().filter(|line| line.contains(" rw")) {
        let range = line.split(' ').next().and_then(|range| range.split_once('-'));
        let (begin, end) = range.context("an odd line in maps")?;
        let (begin, end) = (u64::from_str_radix(begin, 16)?, u64::from_str_radix(end, 16)?);
        if end - begin >= LEAST {
            overwritten += overwrite_in(&memory, &pagemap, begin..end.min(begin + MOST), &text)?;
        }
    }
    ensure!(overwritten > 0, "the agent's program is not in the guest's memory");
    Ok(())
}

fn overwrite_in(memory: &File, pagemap: &File, range: std::ops::Range<u64>, text: &Text) -> Result<usize> {
    let first = range.start / PAGE as u64;
    let mut entries = vec![0; usize::try_from((range.end - range.start) / PAGE as u64 * 8)?];
    pagemap.read_exact_at(&mut entries, first * 8)?;
    let mut overwritten = 0;
    let mut page = [0; PAGE];
    for (entry, number) in entries.chunks_exact(8).zip(first..) {
        let present = entry.try_into().is_ok_and(|entry| u64::from_le_bytes(entry) & PRESENT != 0);
        let at = number * PAGE as u64;
        if present && memory.read_exact_at(&mut page, at).is_ok() && text.holds(&page) {
            memory.write_all_at(&NONSENSE, at)?;
            overwritten += 1;
        }
    }
    Ok(overwritten)
}
