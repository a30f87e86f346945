//! This test binary once more, as a process that a test locks in: the jail is entered for good, and what breaks a filter
//! ends the process.

use std::env;
use std::process::{Command, Output};

/// The exit status of a child that came to its end. No test program ends with it by itself, with nothing run for instance.
pub const CAME_THROUGH: i32 = 42;

/// What the child is given.
const INPUT: &str = "BULKHEAD_TEST_CHILD";

/// Runs one of this binary's ignored tests, named by its path, in a process of its own.
pub fn run(test: &str, input: &str) -> Output {
    let mut command = Command::new(env::current_exe().unwrap());
    command.args(["--exact", test, "--ignored", "--nocapture"]).env(INPUT, input).output().unwrap()
}

/// What a child was given; `None` where somebody runs the ignored tests by hand.
pub fn input() -> Option<String> {
    env::var(INPUT).ok()
}
