//! What KVM answers only under signals and memory pressure, or on other hosts. The machine itself is tested with a real
//! /dev/kvm, tests/vmm.

use super::*;

/// Answers of KVM_CREATE_VM, one after the other; and how many of them were taken.
fn create(answers: &[Result<u8, libc::c_int>]) -> (Result<u8, KvmError>, usize) {
    let mut taken = 0;
    let result = create_vm(|| {
        let answer = answers[taken];
        taken += 1;
        answer.map_err(errno::Error::new)
    });
    (result, taken)
}

#[test]
fn hostile_27_creation_that_signals_interrupt_is_tried_until_it_succeeds() {
    let (machine, taken) = create(&[Err(libc::EINTR), Err(libc::EINTR), Err(libc::EINTR), Ok(7)]);
    assert_eq!((machine.unwrap(), taken), (7, 4));
}

#[test]
fn hostile_27_creation_without_memory_is_reported_with_its_reason_and_not_repeated() {
    for answers in [&[Err(libc::ENOMEM), Ok(7)][..], &[Err(libc::EINTR), Err(libc::ENOMEM), Ok(7)]] {
        let (machine, taken) = create(answers);
        let text = crate::log::describe(&machine.unwrap_err());
        assert_eq!(text, "KVM refused KVM_CREATE_VM: Cannot allocate memory (os error 12)");
        assert_eq!(taken, answers.len() - 1);
    }
}

#[test]
fn performance_counters_are_turned_off_where_kvm_can() {
    let switch = pmu_switch(1).unwrap();
    assert_eq!((switch.cap, switch.args, switch.flags), (212, [1, 0, 0, 0], 0));
    // An older KVM, one without counters, and one with switches of another kind.
    assert!([-1, 0, 2].into_iter().all(|switches| pmu_switch(switches).is_none()));
}

#[test]
fn guest_that_lets_no_event_in_is_left_where_kvm_can() {
    let switch = notify_switch(1).unwrap();
    // Without bit 1, at which every such exit would come to the VMM.
    assert_eq!((switch.cap, switch.args, switch.flags), (219, [1, 0, 0, 0], 0));
    // An older KVM, and a processor without it.
    assert!([-1, 0].into_iter().all(|answer| notify_switch(answer).is_none()));
}
