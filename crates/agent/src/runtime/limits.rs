//! What takes CAP_SYS_RESOURCE in the guest's own user namespace. libcontainer sets a process's OOM score and limits from
//! inside the pod's user namespace, if it has one; so a helper does before what it could not do there.

use std::io;

use oci_spec::runtime::{PosixRlimit, PosixRlimitType};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Sets the OOM score of this process and of those that it forks. It becomes the lowest that they may have without the
/// capability too, so it may be set once more (proc_pid_oom_score_adj(5)).
pub fn set_oom_score(adjustment: i32) -> io::Result<()> {
    std::fs::write("/proc/self/oom_score_adj", adjustment.to_string())
}

/// Raises hard limits to those of a process that this one forks, where everybody may lower them again (setrlimit(2)). The
/// soft ones stay, for this process has work to do. One that is refused is refused to libcontainer too, which says so.
pub fn raise(wanted: &[PosixRlimit]) {
    for limit in wanted {
        let resource = resource(limit.typ());
        if let Some(raised) = raised(getrlimit(resource), limit.hard()) {
            let _ = setrlimit(resource, raised);
        }
    }
}

/// A limit with a higher hard one; `None` if it is high enough. All bits set mean no limit.
fn raised(own: Rlimit, hard: u64) -> Option<Rlimit> {
    let maximum = Some(hard).filter(|hard| *hard != u64::MAX);
    let higher = own.maximum.is_some_and(|own| hard > own);
    higher.then_some(Rlimit { maximum, ..own })
}

fn resource(kind: PosixRlimitType) -> Resource {
    match kind {
        PosixRlimitType::RlimitCpu => Resource::Cpu,
        PosixRlimitType::RlimitFsize => Resource::Fsize,
        PosixRlimitType::RlimitData => Resource::Data,
        PosixRlimitType::RlimitStack => Resource::Stack,
        PosixRlimitType::RlimitCore => Resource::Core,
        PosixRlimitType::RlimitRss => Resource::Rss,
        PosixRlimitType::RlimitNproc => Resource::Nproc,
        PosixRlimitType::RlimitNofile => Resource::Nofile,
        PosixRlimitType::RlimitMemlock => Resource::Memlock,
        PosixRlimitType::RlimitAs => Resource::As,
        PosixRlimitType::RlimitLocks => Resource::Locks,
        PosixRlimitType::RlimitSigpending => Resource::Sigpending,
        PosixRlimitType::RlimitMsgqueue => Resource::Msgqueue,
        PosixRlimitType::RlimitNice => Resource::Nice,
        PosixRlimitType::RlimitRtprio => Resource::Rtprio,
        PosixRlimitType::RlimitRttime => Resource::Rttime,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_hard_limits_are_changed_and_only_upwards() {
        let own = Rlimit { current: Some(10), maximum: Some(20) };
        assert_eq!(raised(own, 30), Some(Rlimit { current: Some(10), maximum: Some(30) }));
        assert_eq!(raised(own, u64::MAX), Some(Rlimit { current: Some(10), maximum: None }));
        for low in [0, 15, 20] {
            assert_eq!(raised(own, low), None);
        }
        assert_eq!(raised(Rlimit { current: Some(10), maximum: None }, u64::MAX), None);
    }
}
