use super::*;
use crate::virtio::testing::{DriverQueue, Ends, TestInterrupt, activation, memory};

fn ring(driver: &DriverQueue, memory: &Memory, interrupt: &Arc<TestInterrupt>) -> Ring {
    Ring::take(&mut activation(memory, 0, &[driver], interrupt), 0).unwrap()
}

#[test]
fn staged_chains_appear_together() {
    let (memory, interrupt) = (memory(), Arc::default());
    let mut driver = DriverQueue::new(&memory, 0x1_0000, 4);
    let mut ring = ring(&driver, &memory, &interrupt);
    for _ in 0..3 {
        ring.stage(1, 10).unwrap();
        ring.stage(2, 20).unwrap();
        assert_eq!(driver.take_used(), None);
        ring.publish().unwrap();
        assert_eq!([driver.take_used(), driver.take_used()], [Some((1, 10)), Some((2, 20))]);
    }
}

#[test]
fn hostile_04_head_that_the_queue_does_not_have_is_an_error() {
    let (memory, interrupt) = (memory(), Arc::default());
    let driver = DriverQueue::new(&memory, 0x1_0000, 4);
    let mut ring = ring(&driver, &memory, &interrupt);
    assert!(matches!(ring.push(4, 0), Err(RingError::Head(4))));
}

#[test]
fn driver_is_interrupted_once_for_the_chain_that_it_waits_for() {
    let (memory, interrupt) = (memory(), Arc::<TestInterrupt>::default());
    let mut driver = DriverQueue::new(&memory, 0x1_0000, 4).with_event_idx();
    let mut ring = ring(&driver, &memory, &interrupt);
    let mut expected = 0;
    // Around the wrap of the indices.
    for _ in 0..0x1_0010 / 2 {
        ring.push(0, 0).unwrap();
        ring.push(1, 0).unwrap();
        ring.notify().unwrap();
        ring.push(2, 0).unwrap();
        // The driver waits for the first of the three.
        ring.notify().unwrap();
        expected += 1;
        while driver.take_used().is_some() {}
    }
    assert_eq!(interrupt.count(0), expected);
}

#[test]
fn hostile_04_drain_that_runs_out_of_budget_comes_back() {
    let (memory, interrupt) = (memory(), Arc::default());
    let mut driver = DriverQueue::new(&memory, 0x1_0000, 8);
    let mut ring = ring(&driver, &memory, &interrupt);
    for _ in 0..5 {
        driver.add(&[(0, 16, false)]);
    }
    let mut step = |ring: &mut Ring| {
        let Some(chain) = ring.pop()? else { return Ok(Step::Empty) };
        ring.push(chain.head_index(), 0)?;
        Ok(Step::Done)
    };
    ring.drain(4, &mut step).unwrap();
    assert_eq!(ring.kick().read().unwrap(), OWN_KICK);
    ring.drain(4, &mut step).unwrap();
    assert!(ring.kick().read().is_err());
    assert_eq!(std::iter::from_fn(|| driver.take_used()).count(), 5);
}

/// The device's own kicks are not the driver's.
#[test]
fn kicks_of_the_driver_are_counted() {
    let (memory, interrupt) = (memory(), Arc::default());
    let mut driver = DriverQueue::new(&memory, 0x1_0000, 8);
    let mut ring = ring(&driver, &memory, &interrupt);
    driver.add(&[(0, 16, false)]);
    driver.kick();
    driver.kick();
    ring.kick_self();
    ring.clear_kick();
    ring.clear_kick();
    let head = ring.pop().unwrap().unwrap().head_index();
    ring.push(head, 0).unwrap();
    ring.notify().unwrap();
    let counted = ring.counts().told(0, 0);
    assert_eq!((counted.kicks, counted.interrupts), (2, 1));
}

/// The driver makes the next chain available before the device asks for it, for ever.
#[test]
fn hostile_04_drain_of_a_ring_that_never_gets_empty_ends_with_its_budget() {
    let (memory, interrupt) = (memory(), Arc::default());
    let mut driver = DriverQueue::new(&memory, 0x1_0000, 8);
    let mut ring = ring(&driver, &memory, &interrupt);
    let head = driver.add(&[(0, 16, false)]);
    for round in 1..=3 {
        let mut steps = 0;
        let drained = ring.drain(100, |ring| {
            steps += 1;
            let Some(chain) = ring.pop()? else { return Ok(Step::Empty) };
            driver.offer(head);
            ring.push(chain.head_index(), 0)?;
            Ok(Step::Done)
        });
        drained.unwrap();
        assert_eq!(steps, 100, "round {round}");
        assert_eq!(ring.kick().read().unwrap(), OWN_KICK, "what is left comes back by a kick");
    }
}

/// The index goes back and forth while the device looks: it takes nothing twice as much as it may.
#[test]
fn hostile_04_index_that_moves_back_is_an_error_not_more_work() {
    let (memory, interrupt) = (memory(), Arc::default());
    let mut driver = DriverQueue::new(&memory, 0x1_0000, 8);
    let mut ring = ring(&driver, &memory, &interrupt);
    for _ in 0..4 {
        driver.add(&[(0, 16, false)]);
    }
    assert!(ring.pop().unwrap().is_some());
    driver.set_avail(0);
    assert!(matches!(ring.pop(), Err(RingError::Queue(_))));
}

#[test]
fn hostile_04_device_gives_back_no_more_chains_together_than_the_ring_has_slots() {
    let (memory, interrupt) = (memory(), Arc::default());
    let driver = DriverQueue::new(&memory, 0x1_0000, 4);
    let mut ring = ring(&driver, &memory, &interrupt);
    (0..4).for_each(|_| ring.stage(1, 0).unwrap());
    assert!(matches!(ring.stage(1, 0), Err(RingError::Head(1))));
}

/// vm-memory #95: a driver on another CPU must not see half of the index. Both bytes of it change every 256 chains.
#[test]
fn hostile_06_used_index_is_never_seen_torn() {
    const CHAINS: u32 = 40 << 16;
    let (memory, interrupt) = (memory(), Arc::default());
    let driver = DriverQueue::new(&memory, 0x1_0000, 4);
    let mut ring = ring(&driver, &memory, &interrupt);
    let (index, stop) = (ring.in_used_ring(2), std::sync::atomic::AtomicBool::new(false));
    let pushed = std::sync::atomic::AtomicU32::new(0);
    let (looks, torn) = std::thread::scope(|scope| {
        let _ends = Ends(&stop);
        let seen = scope.spawn(|| {
            let (mut looks, mut torn) = (0_u32, 0_u32);
            while !stop.load(Ordering::Relaxed) {
                let before = pushed.load(Ordering::Acquire);
                let now = u16::from_le(memory.load(index, Ordering::Acquire).unwrap());
                // One may be in the ring that is not counted yet.
                let pushed_meanwhile = pushed.load(Ordering::Acquire) + 1 - before;
                // A look that was interrupted for half a round of the index says nothing.
                if pushed_meanwhile < 0x8000 {
                    looks += 1;
                    // Half of a new index and half of an old one is less than what was there, by 256 at most.
                    let before = u16::try_from(before & 0xffff).unwrap();
                    torn += u32::from(u32::from(now.wrapping_sub(before)) > pushed_meanwhile);
                }
            }
            (looks, torn)
        });
        for number in 1..=CHAINS {
            ring.push(0, 0).unwrap();
            pushed.store(number, Ordering::Release);
        }
        stop.store(true, Ordering::Relaxed);
        seen.join().unwrap()
    });
    assert!(looks > 100, "only {looks} looks");
    assert_eq!(torn, 0);
}

/// The rings lie in the guest's memory: what the driver says there when it is asked is all that it can change.
#[test]
fn hostile_06_event_index_that_changes_costs_an_interrupt_at_most() {
    let (memory, interrupt) = (memory(), Arc::<TestInterrupt>::default());
    let driver = DriverQueue::new(&memory, 0x1_0000, 4).with_event_idx();
    let mut ring = ring(&driver, &memory, &interrupt);
    let used_event = GuestAddress(ring.queue.avail_ring()).unchecked_add(4 + 2 * 4);
    for (pushed, event) in (1..).zip([0_u16, 7, u16::MAX, 0x8000, 3]) {
        memory.write_obj(event, used_event).unwrap();
        ring.push(0, 0).unwrap();
        ring.notify().unwrap();
        assert!(interrupt.count(0) <= pushed);
    }
}
