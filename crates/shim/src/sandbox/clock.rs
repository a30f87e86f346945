//! The guest's clock follows this host's, of which no event reaches a guest.
//!
//! That the host's clock was set is told at once. Its drift the agent sees for itself where KVM offers the host's clock to
//! guests; where it cannot (the host's clock source is no TSC), the shim compares the two clocks from time to time.

use std::io;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use bulkhead_protocol::agent::{SyncClockRequest, SyncClockResponse};
use rustix::io::Errno;
use rustix::time::{Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec};
use tokio::net::unix::pipe;

use super::agent::{Agent, AgentError};
use crate::deadlines::{Deadline, Operation};

/// Time between two comparisons. A quartz is off by 100 ppm at most, 3.2 ms in that time, and after a few comparisons the guest
/// knows by how much.
const COMPARE_EVERY: Duration = Duration::from_secs(32);

/// Questions of which the best counts: what an answer says is wrong by half the time that it took, at most.
const TRIES: usize = 5;

/// An answer that took no longer than twice this says enough: a guest's files may be newer than its clock by ten times as much.
const GOOD_ERROR: Duration = Duration::from_millis(1);

/// Follows the host's clock for the VM's life.
pub async fn follow(agent: Agent, mut synced: Synced) {
    let host = HostClock::new().inspect_err(|error| {
        tracing::warn!(%error, "cannot watch the node's clock: the guest will not follow when the clock is set");
    });
    let host = host.ok();
    loop {
        tokio::select! {
            () = agent.vm_ended() => return,
            () = stepped(host.as_ref()) => {}
            () = tokio::time::sleep(COMPARE_EVERY), if synced == Synced::ByShim => {}
        }
        match sync(Deadline::begin(Operation::SyncClock), &agent).await {
            Ok(by) => synced = by,
            // A VM that has ended says so above.
            Err(error) => {
                tracing::warn!(%error, "cannot compare the guest's clock with the node's; the guest may drift until the next attempt")
            }
        }
    }
}

/// Who compares the clocks from time to time.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
pub enum Synced {
    /// The agent reads the host's clock by itself.
    ByAgent,
    /// The shim asks for the guest's.
    ByShim,
}

/// Makes the guest's clock that of the host.
pub async fn sync(deadline: Deadline, agent: &Agent) -> Result<Synced, AgentError> {
    let mut best = None::<Offset>;
    for _ in 0..TRIES {
        let (began, asked) = (SystemTime::now(), Instant::now());
        let answer = agent.sync_clock(deadline, SyncClockRequest::default()).await?;
        if answer.reads_host {
            return Ok(Synced::ByAgent);
        }
        let offset = Offset::new(began, asked.elapsed(), &answer);
        if best.as_ref().is_none_or(|best| offset.error_ns < best.error_ns) {
            best = Some(offset);
        }
        if u128::from(offset.error_ns) <= GOOD_ERROR.as_nanos() {
            break;
        }
    }
    if let Some(Offset { ahead_ns, error_ns }) = best
        && ahead_ns.unsigned_abs() > error_ns
    {
        agent.sync_clock(deadline, SyncClockRequest { ahead_ns, error_ns, ..SyncClockRequest::default() }).await?;
    }
    Ok(Synced::ByShim)
}

/// By how much this host's clock is ahead of the guest's, and the most by which that may be wrong.
#[derive(Clone, Copy, Debug, Eq, PartialEq)]
struct Offset {
    ahead_ns: i64,
    error_ns: u64,
}

impl Offset {
    /// The guest answered some time between the question, which this host's clock dates, and the answer.
    fn new(began: SystemTime, took: Duration, answer: &SyncClockResponse) -> Self {
        let middle = began.duration_since(UNIX_EPOCH).unwrap_or_default() + took / 2;
        let nanoseconds = |count| i64::try_from(count).unwrap_or(i64::MAX);
        let ahead_ns = nanoseconds(middle.as_nanos()).saturating_sub(nanoseconds(answer.realtime_ns.into()));
        Self { ahead_ns, error_ns: u64::try_from(took.as_nanos() / 2).unwrap_or(u64::MAX).max(1) }
    }
}

/// Tells when CLOCK_REALTIME is set (timerfd_create(2), TFD_TIMER_CANCEL_ON_SET). To the event loop a timer is what a pipe is:
/// something to read from.
struct HostClock(pipe::Receiver);

impl HostClock {
    fn new() -> io::Result<Self> {
        // In the year 2255: the kernel counts nanoseconds, and has no time much later.
        let never = Timespec { tv_sec: 9_000_000_000, tv_nsec: 0 };
        let once = Itimerspec { it_interval: Timespec { tv_sec: 0, tv_nsec: 0 }, it_value: never };
        let flags = TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK;
        let timer = rustix::time::timerfd_create(TimerfdClockId::Realtime, flags)?;
        let flags = TimerfdTimerFlags::ABSTIME | TimerfdTimerFlags::CANCEL_ON_SET;
        rustix::time::timerfd_settime(&timer, flags, &once)?;
        Ok(Self(pipe::Receiver::from_owned_fd_unchecked(timer)?))
    }

    async fn stepped(&self) -> io::Result<()> {
        loop {
            self.0.readable().await?;
            match self.0.try_read(&mut [0; 8]) {
                // Set beyond the timer's time.
                Ok(_) => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                // It goes on telling.
                Err(error) if Errno::from_io_error(&error) == Some(Errno::CANCELED) => return Ok(()),
                Err(error) => return Err(error),
            }
        }
    }
}

/// Ends when the host's clock has been set; never if nothing tells of it.
async fn stepped(host: Option<&HostClock>) {
    if let Some(host) = host
        && host.stepped().await.is_ok()
    {
        return;
    }
    std::future::pending().await
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sandbox::Sandbox;

    #[test]
    fn answer_is_dated_in_the_middle_of_its_time() {
        let began = UNIX_EPOCH + Duration::from_secs(1000);
        let answer = |realtime_ns| SyncClockResponse { realtime_ns, ..SyncClockResponse::default() };
        let took = Duration::from_millis(4);
        let offset = Offset::new(began, took, &answer(400_002_000_000));
        assert_eq!(offset, Offset { ahead_ns: 600_000_000_000, error_ns: 2_000_000 });
        let offset = Offset::new(began, took, &answer(u64::MAX));
        assert!(offset.ahead_ns < 0, "a guest may say anything: {offset:?}");
    }

    #[tokio::test]
    async fn guest_in_another_time_is_told_by_how_much() {
        let dir = tempfile::tempdir().unwrap();
        let (sandbox, guest) = Sandbox::fake(dir.path()).await;
        for ahead in [-600_000_000_000, 600_000_000_000] {
            guest.set_clock(ahead);
            let deadline = Deadline::begin(Operation::SyncClock);
            assert_eq!(sync(deadline, &sandbox.agent).await.unwrap(), Synced::ByShim);
            assert!(guest.clock().abs() < 1_000_000_000, "{} ns", guest.clock());
        }
    }

    #[tokio::test]
    async fn clock_that_nobody_sets_is_not_told() {
        let host = HostClock::new().unwrap();
        assert!(tokio::time::timeout(Duration::from_millis(10), host.stepped()).await.is_err());
    }
}
