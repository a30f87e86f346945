//! The descriptors that come with a [`VmSpec`](bulkhead_protocol::vmspec::VmSpec), each given out once.

use std::os::fd::OwnedFd;

use bulkhead_protocol::vmspec::FdIndex;

/// Descriptors by index.
pub struct Descriptors(Vec<Option<OwnedFd>>);

impl Descriptors {
    /// Takes over the descriptors of a message.
    pub fn new(fds: Vec<OwnedFd>) -> Self {
        Self(fds.into_iter().map(Some).collect())
    }

    /// Puts a descriptor in the place of one that was taken.
    pub fn put_back(&mut self, index: FdIndex, fd: OwnedFd) {
        if let Some(slot) = self.0.get_mut(index.0) {
            *slot = Some(fd);
        }
    }

    /// Gives the descriptor with this index to its user; `what` names the user in the error.
    pub fn take(&mut self, index: FdIndex, what: &'static str) -> Result<OwnedFd, DescriptorError> {
        let FdIndex(index) = index;
        let slot = self.0.get_mut(index).ok_or(DescriptorError::Missing { index, what })?;
        slot.take().ok_or(DescriptorError::Taken { index, what })
    }
}

/// The spec and its descriptors do not match.
#[derive(Debug, thiserror::Error)]
pub enum DescriptorError {
    /// Fewer descriptors than the spec says.
    #[error("descriptor {index} for the {what} did not come with the spec")]
    Missing {
        /// Its index.
        index: usize,
        /// What it is for.
        what: &'static str,
    },
    /// Two users of one descriptor.
    #[error("descriptor {index} for the {what} is used twice in the spec")]
    Taken {
        /// Its index.
        index: usize,
        /// What it is for.
        what: &'static str,
    },
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hostile_15_descriptor_is_given_out_once_and_a_wrong_index_is_refused() {
        let (reader, _writer) = std::io::pipe().unwrap();
        let mut fds = Descriptors::new(vec![reader.into()]);
        fds.take(FdIndex(0), "kernel").unwrap();
        assert!(matches!(fds.take(FdIndex(0), "kernel"), Err(DescriptorError::Taken { .. })));
        for index in [1, 64, usize::MAX] {
            let error = fds.take(FdIndex(index), "kernel").unwrap_err();
            assert!(matches!(error, DescriptorError::Missing { .. }));
            assert!(error.to_string().contains("for the kernel"), "{error}");
        }
        assert!(matches!(Descriptors::new(vec![]).take(FdIndex(0), "tap"), Err(DescriptorError::Missing { .. })));
    }
}
