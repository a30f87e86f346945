//! Files of every kind of place: the root file system and an emptyDir, which are the pod's own, and a hostPath, which others may
//! change.

use anyhow::Result;

use super::results::Case;
use super::stage::{Bench, Step};

/// Places by the name that their cases have, and the directory in the container.
const PLACES: [(&str, &str); 3] = [("root", "/root"), ("emptydir", "/scratch"), ("hostpath", "/host")];

// What tests/node/images/bench.c does.
const FILES: u32 = 400;
const RECORDS: u32 = 1600;
const READS: u32 = 400;
const MIB: u32 = 64;

/// Measures all of it.
pub async fn measure(bench: &mut Bench) -> Result<()> {
    for (place, directory) in PLACES {
        // One directory for names that change, and one for names that stay.
        let (changing, lasting) = (format!("{directory}/changing"), format!("{directory}/lasting"));
        let (records, big) = (format!("{directory}/records"), format!("{directory}/big"));
        let step = |what: &str, unit, operations, verb: &str, operand: &str| Step {
            case: Case::time(format!("files/{place}/{what}"), unit, operations),
            order: format!("{verb} {operand}"),
        };
        let of_files = |what: &str, operand: &str| step(what, "file", FILES, what, operand);
        let prepare = [format!("mkdir {changing}"), format!("mkdir {lasting}"), format!("create {lasting}")];
        bench.prepare(&prepare).await?;
        bench.steps(&["create", "rename", "unlink"].map(|what| of_files(what, &changing))).await?;
        for what in ["stat", "list", "open", "read"] {
            bench.steps(&[of_files(what, &lasting)]).await?;
        }
        bench.steps(&[step("write 512 B", "write", RECORDS, "write-records", &records)]).await?;
        let stream = [
            step("write 64 MiB and fsync", "MiB", MIB, "write-big", &big),
            step("read 64 MiB", "MiB", MIB, "read-big", &big),
            step("read 64 MiB again", "MiB", MIB, "read-big", &big),
        ];
        bench.steps(&stream).await?;
        bench.steps(&[step("read 4 KiB anywhere", "read", READS, "read-random", &big)]).await?;
        bench.prepare(&[format!("remove {records}"), format!("remove {big}")]).await?;
    }
    Ok(())
}
