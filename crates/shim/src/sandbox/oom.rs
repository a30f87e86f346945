//! Whom the kernel kills when the pod, or the node, has no more memory (proc_pid_oom_score_adj(5)): a VMM is worth what the
//! most protected of its containers would be on the host, and is killed before its shim, which is then there to say so.

use std::fs::File;
use std::os::unix::fs::FileExt;

/// `oom_score_adj` of a shim: the lowest but one, as containerd gives its own.
const SHIM: i32 = -999;
/// The lowest of a VMM's.
const LOWEST: i32 = SHIM + 1;
/// The highest that there is.
const HIGHEST: i32 = 1000;
/// Of a VMM without containers: any ordinary process's.
const NO_CONTAINER: i32 = 0;

/// Protects the shim.
pub fn protect_shim() {
    if let Err(error) = std::fs::write("/proc/self/oom_score_adj", SHIM.to_string()) {
        tracing::debug!(%error, "the kernel chooses between VMM and shim when there is no more memory");
    }
}

/// The score of a VMM. An open file is that of its process for good, whoever gets the pid afterwards.
#[derive(Debug)]
pub struct OomScore(Option<File>);

impl OomScore {
    /// Of a process that is there, or that nobody has waited for. It begins with its parent's score, and has an ordinary
    /// one from now on.
    pub fn of(pid: u32) -> Self {
        let file = File::options().write(true).open(format!("/proc/{pid}/oom_score_adj"));
        let score = Self(file.inspect_err(|error| tracing::warn!(%error, "cannot open the VMM's oom_score_adj; it keeps that of its shim, and is hardly ever killed when the node has no more memory")).ok());
        score.set(NO_CONTAINER);
        score
    }

    /// Changes it. A process that has ended needs none.
    pub fn set(&self, score: i32) {
        let Some(file) = &self.0 else { return };
        match file.write_at(above_the_shims(score).to_string().as_bytes(), 0) {
            Err(error) if error.raw_os_error() != Some(rustix::io::Errno::SRCH.raw_os_error()) => {
                tracing::warn!(%error, score, "cannot set the VMM's oom_score_adj to that of its containers");
            }
            _ => {}
        }
    }
}

fn above_the_shims(score: i32) -> i32 {
    score.clamp(LOWEST, HIGHEST)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn score_is_above_the_shims() {
        assert_eq!([-1000, -999, -998, -997, 1000, 2000].map(above_the_shims), [-998, -998, -998, -997, 1000, 1000]);
    }

    #[test]
    fn score_is_set_and_a_process_that_has_ended_has_none() {
        let mut child =
            std::process::Command::new("sleep").arg("1000").stdout(std::process::Stdio::null()).spawn().unwrap();
        let path = format!("/proc/{}/oom_score_adj", child.id());
        let shown = || std::fs::read_to_string(&path).unwrap().trim().parse::<i32>().unwrap();
        let score = OomScore::of(child.id());
        assert_eq!(shown(), 0);
        // A lower one than at its birth takes a capability that tests may lack.
        let shown = [1000, 5].map(|set| {
            score.set(set);
            shown()
        });
        child.kill().unwrap();
        child.wait().unwrap();
        score.set(1);
        assert_eq!(shown, [1000, 5]);
    }
}
