//! What POSIX says of file systems (tests/node/images/posix.c), with both of the ways in which a guest has files: as its own,
//! and as those that others change too.

use anyhow::{Result, ensure};

use crate::compat::Area::Volumes;
use crate::compat::{Act, Stage, shell};

/// The names of the cases, and the directories that they are about.
const PLACES: [(&str, &str); 3] = [
    ("POSIX on the root file system", "/root-files"),
    ("POSIX on an emptyDir", "/empty-dir"),
    ("POSIX on a hostPath", "/host-path"),
];

/// One for each place.
pub fn acts() -> impl Iterator<Item = Act> {
    PLACES.into_iter().map(|(name, directory)| {
        Act::new(Volumes, name, move |stage| Box::pin(async move { conforms(stage, directory).await }))
    })
}

/// Both handlers could fail in the same way, so a failure is an error here.
async fn conforms(stage: &Stage, directory: &str) -> Result<String> {
    let mut config = shell(&format!("posix-on{}", directory.replace('/', "-")), "exec sleep 1000");
    config.mounts = vec![
        stage.place.mount("posix/volumes/kubernetes.io~empty-dir/own", "/empty-dir"),
        stage.place.mount("posix/host", "/host-path"),
    ];
    let id = stage.run(config).await?;
    let said = stage.shell(&id, &format!("mkdir -p {directory} && posix {directory}")).await?;
    ensure!(said.code == 0, "{}{}", said.stdout, said.stderr);
    Ok(said.stdout)
}
