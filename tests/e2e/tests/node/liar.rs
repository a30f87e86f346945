//! A guest's agent and a VMM that lie (docs/negative-tests.md, 21): the shim keeps its time, its memory and its word to
//! containerd, and other pods notice nothing.
//!
//! No guest is booted: the shim starts [`bulkhead_e2e::liar`] in place of the VMM, which says what its script says. Each
//! case is one pod's whole life as containerd leads it. [`Story::check`] holds for all of them; a test adds what its lie
//! has to lead to.

mod stage;

use std::time::Duration;

use anyhow::{Result, ensure};
use bulkhead_e2e::on_shims;
use bulkhead_e2e::shim::{Code, code};

use stage::{BOOT, LONG, NUMBERS, SHORT, SOON};
pub use stage::{Pod, Stage};

/// Lives of pods beside an honest one.
fn stories(test: impl AsyncFnOnce(&Stage) -> Result<()>) {
    on_shims(async || {
        let stage = Stage::new().await?;
        test(&stage).await?;
        stage.close().await
    });
}

#[test]
fn hostile_21_frame_longer_than_any_answer_ends_the_pod_and_grows_nothing() {
    stories(async |stage| {
        for lie in ["oversize", "largest", "endless"] {
            // The answer is the last: the connection is not believed any more, and the VM goes with it.
            let story = stage.life(&format!("StartContainer:{lie}")).await?;
            ensure!(story.refusal("start")?.contains("the pod's guest"), "{story:#?}");
            ensure!(story.value("wait")? == 137 && story.value("delete")? == 137, "{story:#?}");
            story.took("start", SOON)?;
            let story = stage.life(&format!("CreateSandbox:{lie}")).await?;
            ensure!(story.refusal("boot")?.contains("the pod's guest"), "{story:#?}");
            story.took("boot", SOON)?;
        }
        Ok(())
    });
}

#[test]
fn hostile_21_frame_shorter_than_it_says_holds_calls_to_their_bounds_only() {
    stories(async |stage| {
        for lie in ["truncated", "half-header"] {
            // What comes after it is taken for the rest of it.
            let story = stage.life(&format!("GetStats:{lie}")).await?;
            ensure!(story.value("wait")? == 137 && story.value("delete")? == 137, "{story:#?}");
            story.took("stats", NUMBERS + SOON)?;
            story.took("kill", SHORT + SOON)?;
        }
        let story = stage.life("GetStats:truncated-large").await?;
        ensure!(story.value("wait")? == 137 && story.value("delete")? == 137, "{story:#?}");
        Ok(())
    });
}

#[test]
fn hostile_21_bytes_that_are_no_message_are_an_error_and_no_more() {
    stories(async |stage| {
        for lie in
            ["groups", "inner-groups", "closed-groups", "nonsense", "fields", "garbage", "empty", "kind", "request"]
        {
            for at in ["GetStats", "StartContainer"] {
                let story = stage.life(&format!("{at}:{lie}")).await?;
                ensure!(story.value("wait")? == 137 && story.value("delete")? == 137, "{story:#?}");
                story.took("kill", SOON)?;
            }
            let story = stage.life(&format!("WaitProcess:{lie}")).await?;
            // A guest that does not say how a process ended is not one; an answer without a code says 0.
            let code = story.value("wait")?;
            ensure!(code == 137 || (code == 0 && matches!(lie, "empty" | "fields" | "closed-groups")), "{story:#?}");
        }
        Ok(())
    });
}

#[test]
fn hostile_21_answers_to_nobody_and_answers_again_are_not_heard() {
    stories(async |stage| {
        for lie in ["strangers", "twice"] {
            for at in ["CreateSandbox", "StartContainer", "GetStats", "WaitProcess"] {
                let story = stage.life(&format!("{at}:{lie}")).await?;
                let code = story.value("wait")?;
                ensure!(story.value("boot").is_ok() && story.value("delete")? == code, "{story:#?}");
                ensure!(story.value("start").is_ok() && story.value("stats").is_ok() && code == 137, "{story:#?}");
            }
        }
        let story = stage.life("GetStats:data").await?;
        ensure!(story.value("wait")? == 137 && story.value("delete")? == 137, "{story:#?}");
        Ok(())
    });
}

#[test]
fn hostile_21_refusal_is_told_in_one_bounded_line() {
    stories(async |stage| {
        for lie in ["says-much", "says-control", "says-unimplemented", "says-nothing-known", "says-not-found"] {
            for (at, call) in [("CreateSandbox", "boot"), ("CreateContainer", "create"), ("StartContainer", "start")] {
                let story = stage.life(&format!("{at}:{lie}")).await?;
                // `Story::check` looks at the text. A code that nobody knows is none, and no code is no refusal: but what
                // comes with it names no release.
                let refused = story.refusal(call).is_ok();
                ensure!(refused == (lie != "says-nothing-known" || call == "boot"), "{story:#?}");
                story.took(call, SHORT)?;
            }
            for at in ["WaitProcess", "DeleteContainer", "NextEvent", "Exec"] {
                let story = stage.life(&format!("{at}:{lie}")).await?;
                // What says too much is not listened to any more, which may be before there is a container.
                if story.value("create").is_ok() || lie != "says-much" {
                    let told = lie == "says-nothing-known" && at == "WaitProcess";
                    ensure!(story.value("wait")? == if told { 0 } else { 137 }, "{story:#?}");
                    ensure!(story.value("delete").is_ok(), "{story:#?}");
                }
            }
        }
        let story = stage.life("DestroySandbox:says-control").await?;
        story.took("remove", SHORT)?;
        let story = stage.life("StartContainer:says-ok").await?;
        ensure!(story.value("wait")? == 137, "{story:#?}");
        Ok(())
    });
}

#[test]
fn hostile_21_guest_image_of_another_release_is_named() {
    stories(async |stage| {
        let story = stage.life("CreateSandbox:other-release").await?;
        let told = story.refusal("boot")?;
        ensure!(told.contains("0.0.1") && told.contains("install both from the same release"), "{told}");
        Ok(())
    });
}

#[test]
fn hostile_21_refusal_to_kill_does_not_keep_a_pod_from_being_removed() {
    stories(async |stage| {
        // As if it were gone already, and as if it could not be done: the container goes on.
        for (lie, code_of_kill) in [("says-not-found", Code::NOT_FOUND), ("says-control", Code::UNKNOWN)] {
            let story = stage.life(&format!("SignalProcess:{lie}")).await?;
            ensure!(code(&story.of("kill")?.1) == code_of_kill, "{story:#?}");
            ensure!(story.value("wait")? == 137 && story.value("delete")? == 137, "{story:#?}");
            story.took("wait", LONG + SOON)?;
        }
        Ok(())
    });
}

#[test]
fn hostile_21_numbers_are_bounded_in_count_and_size() {
    stories(async |stage| {
        let story = stage.life("GetStats:numbers").await?;
        ensure!(story.value("stats")? <= 3 * 64, "{story:#?}");
        ensure!(story.value("wait")? == 137, "{story:#?}");
        let story = stage.life("GetStats:some-entries").await?;
        ensure!(story.value("stats")? <= 64, "{story:#?}");
        let story = stage.life("GetStats:entries").await?;
        ensure!(story.refusal("stats")?.contains("the pod's guest"), "{story:#?}");
        ensure!(story.value("wait")? == 137, "{story:#?}");
        Ok(())
    });
}

#[test]
fn hostile_21_exit_code_is_one_that_a_process_can_have() {
    stories(async |stage| {
        let story = stage.life("WaitProcess:code").await?;
        ensure!(story.value("wait")? == 255 && story.value("delete")? == 255, "{story:#?}");
        Ok(())
    });
}

#[test]
fn hostile_21_events_of_others_are_not_passed_on_and_a_flood_of_own_ones_drowns_no_exit() {
    stories(async |stage| {
        for lie in ["oom-of-nobody", "oom-of-many"] {
            let story = stage.life(&format!("NextEvent:{lie}")).await?;
            ensure!(!story.events.contains_key("/tasks/oom"), "{story:#?}");
            ensure!(story.value("wait")? == 137, "{story:#?}");
        }
        let story = stage.life("NextEvent:oom").await?;
        let ends = |topic: &str| story.events.get(topic).copied().unwrap_or_default();
        // Of the sandbox, the container and the exec.
        ensure!(ends("/tasks/exit") == 3 && ends("/tasks/delete") == 2, "{story:#?}");
        ensure!(ends("/tasks/oom") <= 64, "{story:#?}");
        Ok(())
    });
}

#[test]
fn hostile_21_demands_for_memory_without_end_hold_up_no_call() {
    stories(async |stage| {
        for lie in ["more", "less", "nonsense"] {
            let story = stage.life(&format!("NextDemand:{lie}")).await?;
            ensure!(story.value("boot").is_ok() && story.value("wait")? == 137, "{lie}: {story:#?}");
        }
        Ok(())
    });
}

#[test]
fn hostile_21_agent_that_never_answers_is_waited_for_in_bounded_time() {
    stories(async |stage| {
        let story = stage.life("GetStats:silent,WaitProcess:silent,SignalProcess:silent").await?;
        ensure!(code(&story.of("stats")?.1) == Code::DEADLINE_EXCEEDED, "{story:#?}");
        story.took("stats", NUMBERS + SOON)?;
        story.took("kill", SHORT + SOON)?;
        ensure!(story.value("wait")? == 137 && story.value("delete")? == 137, "{story:#?}");
        let story = stage.life("DeleteContainer:silent,DestroySandbox:silent").await?;
        story.took("delete", SHORT + SOON)?;
        story.took("remove", SHORT)?;
        Ok(())
    });
}

#[test]
fn hostile_21_agent_that_answers_just_in_time_is_waited_for_in_bounded_time() {
    stories(async |stage| {
        // Numbers have a second, and there are none that were known before.
        let script = "GetStats:slow-4,SignalProcess:slow-18,DeleteContainer:slow-18,DestroySandbox:slow-18";
        let story = stage.life(script).await?;
        ensure!(story.refusal("stats")?.contains("within 1s") && story.value("wait")? == 137, "{story:#?}");
        story.took("stats", NUMBERS + SOON)?;
        story.took("kill", SHORT + SOON)?;
        story.took("delete", SHORT + SOON)?;
        // The guest's own end has one bound for all of it.
        story.took("remove", SHORT)?;
        Ok(())
    });
}

#[test]
fn hostile_21_agent_that_makes_nothing_is_waited_for_in_bounded_time() {
    stories(async |stage| {
        let story = stage.life("CreateContainer:silent").await?;
        ensure!(code(&story.of("create")?.1) == Code::DEADLINE_EXCEEDED, "{story:#?}");
        story.took("create", LONG + SHORT + SOON)
    });
}

#[test]
fn hostile_21_streams_that_lie_hold_up_neither_the_shim_nor_the_end() {
    stories(async |stage| {
        // Nobody reads the fifo: what is in it stays, and the guest waits.
        let story = stage.life("stdout:flood").await?;
        ensure!(story.value("wait")? == 137 && story.value("delete")? == 137, "{story:#?}");
        story.took("wait", LONG)?;
        for lie in ["stays", "flood-after", "trickle"] {
            let story = stage.life(&format!("stdout:{lie}")).await?;
            ensure!(story.value("wait")? == 137 && story.value("delete")? == 137, "{story:#?}");
            // 5 s of silence, or 30 s of noise.
            story.took("wait", Duration::from_secs(30) + SOON)?;
            story.took("delete", SOON)?;
        }
        for lie in ["refused", "odd", "close"] {
            let story = stage.life(&format!("stdout:{lie}")).await?;
            ensure!(story.refusal("create")?.contains("stream"), "{story:#?}");
            story.took("create", SHORT)?;
        }
        let story = stage.life("stdout:silent").await?;
        ensure!(story.refusal("create")?.contains("stream"), "{story:#?}");
        story.took("create", Duration::from_secs(30) + SHORT)
    });
}

#[test]
fn hostile_21_vmm_that_floods_is_not_listened_to_for_long() {
    stories(async |stage| {
        for lie in ["replies", "failures", "ready", "fds", "stderr", "console"] {
            let story = stage.life(&format!("StartContainer:vmm-{lie}")).await?;
            ensure!(story.value("start").is_ok(), "{story:#?}");
            ensure!(story.value("wait")? == 137 && story.value("delete")? == 137, "{story:#?}");
            story.took("kill", SOON)?;
        }
        Ok(())
    });
}

#[test]
fn hostile_21_vmm_that_says_its_end_or_closes_its_socket_is_ended() {
    stories(async |stage| {
        for lie in ["exited", "exits", "closed", "huge", "nonsense", "deep"] {
            let story = stage.unkilled_life(&format!("GetStats:vmm-{lie}")).await?;
            ensure!(story.value("wait")? == 137 && story.value("delete")? == 137, "{story:#?}");
            story.took("wait", SOON)?;
        }
        Ok(())
    });
}

#[test]
fn hostile_21_vmm_that_does_not_boot_is_told_in_one_bounded_line() {
    stories(async |stage| {
        for lie in ["silent", "exit", "vmm-refuses", "vmm-exited", "vmm-closed", "vmm-huge", "vmm-nonsense"] {
            let story = stage.life(&format!("Boot:{lie}")).await?;
            if lie != "vmm-exited" {
                story.refusal("boot")?;
            }
            story.took("boot", BOOT + SOON)?;
        }
        Ok(())
    });
}

#[test]
fn hostile_21_vmm_that_exits_at_any_step_ends_its_pod_alone() {
    stories(async |stage| {
        let steps = ["Boot", "connect-1024", "CreateSandbox", "NextEvent", "CreateContainer", "connect-1025", "stdout"];
        let later = ["StartContainer", "WaitProcess", "Exec", "GetStats", "SignalProcess", "DeleteContainer"];
        for at in steps.into_iter().chain(later) {
            let story = stage.life(&format!("{at}:exit")).await?;
            if story.value("boot").is_ok() && story.value("create").is_ok() {
                ensure!(story.value("wait")? == 137 && story.value("delete")? == 137, "{story:#?}");
                story.took("wait", SOON)?;
            }
        }
        Ok(())
    });
}
