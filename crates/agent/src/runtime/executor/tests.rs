use oci_spec::runtime::{Capabilities, LinuxCapabilitiesBuilder, ProcessBuilder};

use super::*;

fn process(program: &str, env: &[&str]) -> Process {
    ProcessBuilder::default()
        .args(vec![program.to_owned()])
        .env(env.iter().map(ToString::to_string).collect::<Vec<_>>())
        .build()
        .unwrap()
}

#[test]
fn program_is_searched_in_the_path_of_the_process() {
    assert_eq!(find_program(&process("sh", &["PATH=/nowhere:/bin"])).unwrap(), Path::new("/bin/sh"));
    assert_eq!(find_program(&process("sh", &[])).unwrap().file_name().unwrap(), "sh");
    let error = find_program(&process("sh", &["PATH=/nowhere"])).unwrap_err();
    assert_eq!(error, "exec: \"sh\": executable file not found in $PATH");
}

#[test]
fn relative_entries_of_the_path_are_not_searched() {
    assert!(find_program(&process("main.rs", &["PATH=src:."])).is_err());
}

#[test]
fn path_of_a_program_is_taken_as_it_is() {
    assert_eq!(find_program(&process("/bin/sh", &[])).unwrap(), Path::new("/bin/sh"));
    assert!(
        find_program(&process("/nowhere/sh", &[]))
            .unwrap_err()
            .ends_with("stat /nowhere/sh: no such file or directory")
    );
    assert!(find_program(&process("/etc/passwd", &[])).unwrap_err().ends_with(": permission denied"));
    assert!(find_program(&process("/etc", &[])).unwrap_err().ends_with(": permission denied"));
    assert!(find_program(&process("", &[])).is_err());
}

fn with_capabilities(no_new_privileges: bool) -> Process {
    let chown: Capabilities = [Capability::Chown].into();
    let mut process = process("sh", &[]);
    let set = LinuxCapabilitiesBuilder::default().bounding(chown.clone()).effective(chown.clone()).permitted(chown);
    process.set_capabilities(Some(set.build().unwrap()));
    process.set_no_new_privileges(Some(no_new_privileges));
    process
}

#[test]
fn filter_without_no_new_privs_needs_capabilities_that_are_dropped_after_it() {
    let mut process = with_capabilities(false);
    let before = process.capabilities().clone();
    let real = Confinement::widen(&mut process);
    let wide = process.capabilities().as_ref().unwrap();
    assert!(wide.effective().as_ref().unwrap().contains(&Capability::SysAdmin));
    assert!(wide.bounding().as_ref().unwrap().contains(&Capability::Setpcap));
    assert_eq!(real, before);
}

#[test]
fn filter_with_no_new_privs_needs_nothing() {
    let mut process = with_capabilities(true);
    let before = process.clone();
    assert_eq!(Confinement::widen(&mut process), None);
    assert_eq!(process, before);
}
