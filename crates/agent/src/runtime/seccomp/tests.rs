use serde_json::{Value, json};

use super::*;

const ALLOW: u32 = libc::SECCOMP_RET_ALLOW;
const KILL: u32 = libc::SECCOMP_RET_KILL_PROCESS;

fn errno(number: i32) -> u32 {
    libc::SECCOMP_RET_ERRNO | number.unsigned_abs()
}

fn compile(profile: Value) -> Filter {
    Filter::compile(&serde_json::from_value(profile).unwrap()).unwrap()
}

/// An allow-list like that of a container engine.
fn allow_list(default: &str) -> Filter {
    compile(json!({
        "defaultAction": default,
        "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
        "syscalls": [
            {"names": ["read", "faccessat2", "no_such_call"], "action": "SCMP_ACT_ALLOW"},
            {"names": ["clone"], "action": "SCMP_ACT_ALLOW",
             "args": [{"index": 0, "value": 0x7e02_0000, "valueTwo": 0, "op": "SCMP_CMP_MASKED_EQ"}]},
            {"names": ["personality"], "action": "SCMP_ACT_ALLOW", "args": [
                {"index": 0, "value": 0, "op": "SCMP_CMP_EQ"}, {"index": 0, "value": 8, "op": "SCMP_CMP_EQ"}]}
        ]
    }))
}

#[test]
fn filter_is_kept_as_bytes() {
    let filter = allow_list("SCMP_ACT_ERRNO");
    let bytes = filter.to_bytes();
    let read = Filter::from_bytes(&bytes).unwrap();
    let same = |(a, b): (&sock_filter, &sock_filter)| (a.code, a.jt, a.jf, a.k) == (b.code, b.jt, b.jf, b.k);
    assert!(read.program.len() == filter.program.len() && read.program.iter().zip(&filter.program).all(same));
    assert_eq!(read.flags, filter.flags);
    assert!(Filter::from_bytes(&bytes[..bytes.len() - 1]).is_none() && Filter::from_bytes(b"").is_none());
}

/// What the kernel would make of a call: a classic BPF machine for what filters consist of.
fn answer(filter: &Filter, audit: u32, number: u32, first_argument: u64) -> u32 {
    let low = u32::try_from(first_argument & u64::from(u32::MAX)).unwrap();
    let high = u32::try_from(first_argument >> 32).unwrap();
    let (mut at, mut accumulator) = (0, 0);
    loop {
        let sock_filter { code, jt, jf, k } = filter.program[at];
        at += 1;
        let jump = |condition: bool| usize::from(if condition { jt } else { jf });
        match code {
            LOAD => {
                accumulator = match k {
                    NUMBER_OFFSET => number,
                    ARCHITECTURE_OFFSET => audit,
                    16 => low,
                    20 => high,
                    offset => panic!("{offset}"),
                }
            }
            0x54 => accumulator &= k,
            JUMP => at += usize::try_from(k).unwrap(),
            JUMP_EQUAL => at += jump(accumulator == k),
            JUMP_GREATER => at += jump(accumulator > k),
            0x35 => at += jump(accumulator >= k),
            JUMP_SET => at += jump(accumulator & k != 0),
            RETURN => return k,
            code => panic!("{code:#x}"),
        }
    }
}

#[test]
fn calls_younger_than_the_profile_do_not_exist() {
    // faccessat2 is 439 everywhere; fchmodat2 452.
    for (default, refused) in [("SCMP_ACT_ERRNO", errno(libc::EPERM)), ("SCMP_ACT_KILL_PROCESS", KILL)] {
        let filter = allow_list(default);
        for (audit, bit) in [(AUDIT_ARCH_X86_64, 0), (AUDIT_ARCH_X86_64, X32_BIT), (AUDIT_ARCH_I386, 0)] {
            let answer = |number: u32| answer(&filter, audit, bit | number, 0);
            assert_eq!(answer(439), ALLOW, "{audit:#x} {bit:#x}");
            assert_eq!(answer(437), refused, "{audit:#x} {bit:#x}");
            // x32 has calls of its own behind those of x86_64, so its last is another.
            let beyond = if bit == 0 { 440 } else { 600 };
            assert_eq!(answer(beyond), errno(libc::ENOSYS), "{audit:#x} {bit:#x}");
        }
    }
}

#[test]
fn architectures_that_the_profile_lacks_are_killed() {
    let filter = compile(json!({
        "defaultAction": "SCMP_ACT_ERRNO", "syscalls": [{"names": ["read"], "action": "SCMP_ACT_ALLOW"}]
    }));
    assert_eq!(answer(&filter, AUDIT_ARCH_X86_64, 0, 0), ALLOW);
    assert_eq!(answer(&filter, AUDIT_ARCH_X86_64, 452, 0), errno(libc::ENOSYS));
    for (audit, number) in [(AUDIT_ARCH_I386, 452), (AUDIT_ARCH_X86_64, X32_BIT | 452)] {
        assert_eq!(answer(&filter, audit, number, 0), libc::SECCOMP_RET_KILL_THREAD);
    }
}

#[test]
fn default_that_lets_through_or_says_the_same_is_kept() {
    for (default, answered) in [
        (json!({"defaultAction": "SCMP_ACT_ALLOW"}), ALLOW),
        (json!({"defaultAction": "SCMP_ACT_LOG"}), libc::SECCOMP_RET_LOG),
        (json!({"defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 38}), errno(libc::ENOSYS)),
    ] {
        let mut profile = default;
        profile["syscalls"] = json!([{"names": ["read"], "action": "SCMP_ACT_ERRNO", "errnoRet": 28}]);
        let filter = compile(profile);
        assert_eq!(answer(&filter, AUDIT_ARCH_X86_64, 452, 0), answered);
        assert_eq!(answer(&filter, AUDIT_ARCH_X86_64, 0, 0), errno(28));
    }
}

#[test]
fn masked_comparison_has_its_mask_first() {
    let filter = allow_list("SCMP_ACT_ERRNO");
    let clone = |flags: i32| answer(&filter, AUDIT_ARCH_X86_64, 56, u64::from(flags.unsigned_abs()));
    assert_eq!(clone(libc::CLONE_VM | libc::CLONE_FILES), ALLOW);
    for flag in [libc::CLONE_NEWUSER, libc::CLONE_NEWNS, libc::CLONE_NEWNET | libc::CLONE_VM] {
        assert_eq!(clone(flag), errno(libc::EPERM), "{flag:#x}");
    }
}

#[test]
fn several_conditions_on_one_argument_are_alternatives() {
    let filter = allow_list("SCMP_ACT_ERRNO");
    for (value, answered) in [(0, ALLOW), (8, ALLOW), (4, errno(libc::EPERM)), (8 | 1 << 32, errno(libc::EPERM))] {
        assert_eq!(answer(&filter, AUDIT_ARCH_X86_64, 135, value), answered, "{value}");
    }
}

#[test]
fn profiles_that_need_a_listener_are_refused() {
    let profile = json!({
        "defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["mkdir"], "action": "SCMP_ACT_NOTIFY"}]
    });
    let refused = Filter::compile(&serde_json::from_value(profile).unwrap());
    assert!(matches!(refused, Err(FilterError::Listener)));
}

#[test]
fn calls_that_libseccomp_cannot_name_are_answered() {
    let everywhere = [(AUDIT_ARCH_X86_64, 0), (AUDIT_ARCH_X86_64, X32_BIT), (AUDIT_ARCH_I386, 0)];
    let compare = json!([{"index": 0, "value": 1, "op": "SCMP_CMP_EQ"}]);
    let profile = |default: &str, rules: Value| {
        let architectures = ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"];
        compile(json!({"defaultAction": default, "architectures": architectures, "syscalls": rules}))
    };
    let deny = profile(
        "SCMP_ACT_ALLOW",
        json!([
            {"names": ["statmount", "read"], "action": "SCMP_ACT_ERRNO", "errnoRet": 28},
            {"names": ["statmount"], "action": "SCMP_ACT_ALLOW"},
            {"names": ["lsm_list_modules"], "action": "SCMP_ACT_ERRNO", "args": compare},
            {"names": ["mseal"], "action": "SCMP_ACT_KILL_PROCESS"}
        ]),
    );
    let allow = profile(
        "SCMP_ACT_ERRNO",
        json!([
            {"names": ["read", "mseal"], "action": "SCMP_ACT_ALLOW"},
            {"names": ["statmount"], "action": "SCMP_ACT_ALLOW", "args": compare}
        ]),
    );
    for (audit, bit) in everywhere {
        let answers = |filter: &Filter| [457, 458, 461, 462, 463].map(|number| answer(filter, audit, bit | number, 0));
        assert_eq!(answers(&deny), [errno(28), ALLOW, errno(libc::EPERM), KILL, ALLOW], "{audit:#x} {bit:#x}");
        let refused = errno(libc::EPERM);
        let younger = errno(libc::ENOSYS);
        assert_eq!(answers(&allow), [refused, refused, refused, ALLOW, younger], "{audit:#x} {bit:#x}");
    }
    // What is of no architecture of the profile's is killed whatever it is.
    let own = compile(json!({
        "defaultAction": "SCMP_ACT_ERRNO", "syscalls": [{"names": ["mseal"], "action": "SCMP_ACT_ALLOW"}]
    }));
    assert_eq!(answer(&own, AUDIT_ARCH_X86_64, 462, 0), ALLOW);
    assert_eq!(answer(&own, AUDIT_ARCH_I386, 462, 0), libc::SECCOMP_RET_KILL_THREAD);
    assert_eq!(answer(&own, AUDIT_ARCH_X86_64, X32_BIT | 462, 0), libc::SECCOMP_RET_KILL_THREAD);
}

#[test]
fn filter_that_the_kernel_would_not_take_is_refused() {
    let profile = |rules: u32| {
        let rule = |value: u32| {
            json!({"names": ["read"], "action": "SCMP_ACT_ERRNO",
                   "args": [{"index": 0, "value": value, "op": "SCMP_CMP_EQ"}]})
        };
        let rules: Vec<Value> = (0..rules).map(rule).collect();
        Filter::compile(&serde_json::from_value(json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": rules})).unwrap())
    };
    assert!(profile(100).is_ok());
    let Err(error) = profile(5000).map(|_| ()) else { panic!("a filter of 5000 comparisons") };
    assert!(error.to_string().contains("more than the 4096 that the kernel takes"), "{error}");
}
