//! Landlock (landlock(7)), where the host's kernel has it: a second lock on the same door. The mount namespace hides
//! everything but the share; these rules hold even for a descriptor that leads out of it.

use std::os::fd::OwnedFd;

use ::landlock::{
    ABI, Access, AccessFs, AccessNet, CompatLevel, Compatible, PathBeneath, Ruleset, RulesetAttr, RulesetCreatedAttr,
    RulesetError, RulesetStatus, Scope,
};

/// The newest rules that we know; a kernel with fewer has what it has.
const KNOWN: ABI = ABI::V6;

/// Allows the process what is in the share, but no program, no block device, and no network or signal at all. Answers whether the
/// kernel holds it to that, as far as it knows such rules.
pub fn restrict(share: Option<&OwnedFd>) -> Result<bool, RulesetError> {
    let all = AccessFs::from_all(KNOWN);
    let rules = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(all)?
        .handle_access(AccessNet::from_all(KNOWN))?
        .scope(Scope::from_all(KNOWN))?
        .create()?;
    // Character devices: a whiteout of overlayfs is one, and the only one that a process without CAP_MKNOD can make.
    let allowed = all & !(AccessFs::Execute | AccessFs::MakeBlock | AccessFs::IoctlDev);
    let rules = match share {
        Some(share) => rules.add_rule(PathBeneath::new(share, allowed))?,
        None => rules,
    };
    Ok(rules.restrict_self()?.ruleset != RulesetStatus::NotEnforced)
}
