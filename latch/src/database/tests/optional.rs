//! Optional protection (RFC 5660 §3.1).

use std::collections::HashSet;

use ipsec::guard::LogicalSpd;
use ipsec::plane::ShuntAction;

use super::*;

/// The routing's part of the SPD.
#[derive(Default)]
struct FakeSpd {
    bypassed: Mutex<HashSet<Flow>>,
    refuses: AtomicBool,
}

impl LogicalSpd for FakeSpd {
    fn bypass(&self, flow: &Flow) -> Result<(), String> {
        self.bypassed.lock().unwrap().remove(flow);
        if self.refuses.load(Ordering::SeqCst) {
            return Err("refused".to_owned());
        }
        self.bypassed.lock().unwrap().insert(*flow);
        Ok(())
    }

    fn remove(&self, flow: &Flow) {
        self.bypassed.lock().unwrap().remove(flow);
    }
}

/// A database with all that it can be told of the system.
fn system(alone: bool) -> (Database, Vec<ClassId>, Arc<FakeBarrier>, Arc<FakeSpd>) {
    let (database, classes) = database();
    let barrier = Arc::new(FakeBarrier { alone, ..FakeBarrier::default() });
    let spd = Arc::new(FakeSpd::default());
    database.set_barrier(Arc::clone(&barrier) as _);
    database.set_logical_spd(Arc::clone(&spd) as _);
    (database, classes, barrier, spd)
}

fn verdicts(database: &Database, flow: &Flow, class: Option<ClassId>) -> [Verdict; 2] {
    [Direction::Outbound, Direction::Inbound].map(|direction| database.check(direction, flow, class))
}

fn shunt(action: ShuntAction, n: usize) -> ShuntedTraffic {
    let (local, remote) = TrafficSelector::of_flow(&flow(n));
    ShuntedTraffic { name: "aside".to_owned(), action, local_ts: vec![local], remote_ts: vec![remote] }
}

#[test]
fn a_bypassed_flow_passes_under_no_sa_and_stands_in_the_way_of_none() {
    for alone in [false, true] {
        let (database, classes, barrier, spd) = system(alone);
        install(&database, 1, classes[0]);
        let (holder, told) = counting();
        let latch = database.bypass(flow(1), Some(7), holder).unwrap();
        for class in [classes[0], classes[1]] {
            assert_eq!(verdicts(&database, &flow(1), Some(class)), [Verdict::Drop; 2]);
            assert_eq!(database.check_later(&flow(1), Some(class)), Verdict::Drop, "an ICMP error about it");
        }
        assert_eq!(verdicts(&database, &flow(1), None), [Verdict::Pass; 2]);
        assert_eq!(verdicts(&database, &flow(2), Some(classes[0])), [Verdict::Pass; 2], "another flow");
        // Later fragments of others pass; of its own there is no first one.
        let fragment = Flow { local_port: 0, remote_port: 0, ..flow(1) };
        assert_eq!(verdicts(&database, &fragment, Some(classes[0])), [Verdict::Pass; 2]);
        assert_eq!(barrier.passage(&flow(1)), Some(Passage::Clear));
        assert!(spd.bypassed.lock().unwrap().contains(&flow(1)));

        // SAs come and go, of whomever; so does the peer.
        install(&database, 2, classes[1]);
        assert!(database.reserved(&everything(), &everything(), |_| Newcomer::Stranger).is_empty());
        database.removed(1);
        database.peer_is_dead(classes[0]);
        database.peer_restarted(classes[1]);
        database.policy_changed(|_, _| Some("all has changed".to_owned()));
        assert_eq!(told.load(Ordering::SeqCst), 0);
        let listed = database.inquire(latch).unwrap();
        assert!(matches!(listed.subject, Subject::Bypass(of) if of == flow(1)));
        assert_eq!((listed.state, listed.owner, listed.automatic), (LatchState::Established, Some(7), false));
        assert_eq!(database.find_bypass(&flow(1)), Some((latch, LatchState::Established)));
        assert!(database.find(&flow(1)).is_none() && database.find_bypass(&flow(2)).is_none());
        let protector = if alone { Protector::System } else { Protector::EngineAndSystem };
        assert_eq!((database.protector(latch), database.bypasses()), (Some(protector), vec![(latch, flow(1))]));
        assert!(database.channel_binding(latch).is_err() && database.endpoint_keys(latch).is_err());

        // With the latch all of it goes, and what is left of the connection goes nowhere.
        database.release(latch);
        assert_eq!(barrier.flows.lock().unwrap().get(&flow(1)), Some(&(Passage::None, true)));
        assert!(spd.bypassed.lock().unwrap().is_empty() && database.bypasses().is_empty());
        assert_eq!(verdicts(&database, &flow(1), Some(classes[1])), [Verdict::Pass; 2]);
        assert!(matches!(database.bypass(flow(1), None, ignore()), Err(LatchError::Policy { .. })), "not yet");
        database.lift_abandoned(|_| true);
        database.bypass(flow(1), None, ignore()).unwrap();
    }
}

#[test]
fn a_flow_that_has_a_latch_is_never_bypassed_nor_a_bypassed_one_latched() {
    let (database, classes, _, spd) = system(false);
    install(&database, 1, classes[0]);
    database.create(flow(1), &waiting(), ignore()).unwrap();
    let refused = |n: usize| database.bypass(flow(n), None, ignore()).unwrap_err();
    assert!(matches!(refused(1), LatchError::Exists(_)));
    // A BROKEN one neither, nor what a listener takes, nor a LARVAL one.
    database.before_install(classes[1], &everything(), &everything()).unwrap();
    assert!(matches!(refused(1), LatchError::Exists(_)));
    database.reserve(flow(2)).unwrap();
    assert!(matches!(refused(2), LatchError::Exists(_)));
    let inbound = (0..ALL_FLOWS).find(|n| listener().takes(&flow(*n))).unwrap();
    let parent = database.create_listener(listener(), any(), ignore()).unwrap();
    assert!(matches!(refused(inbound), LatchError::Exists(_)));
    database.release(parent);
    let no_connection = Flow { remote_port: 0, ..flow(0) };
    assert!(matches!(database.bypass(no_connection, None, ignore()), Err(LatchError::NotAConnection(_))));
    assert!(spd.bypassed.lock().unwrap().is_empty());

    let latch = database.bypass(flow(0), None, ignore()).unwrap();
    assert!(matches!(refused(0), LatchError::Exists(_)));
    assert!(matches!(database.create(flow(0), &any(), ignore()), Err(LatchError::Exists(_))));
    assert!(matches!(database.reserve(flow(0)), Err(LatchError::Exists(_))));
    assert!(matches!(database.accept(parent, &flow(0), None, ignore()), Err(LatchError::NotAccepted(_))));
    database.release(latch);
    database.lift_abandoned(|_| true);
    database.create(flow(0), &any(), ignore()).unwrap();
}

#[test]
fn an_automatic_latch_does_not_give_way_to_a_bypass() {
    let (database, classes) = database();
    database.latch_flows(OnBreak::Wait);
    install(&database, 1, classes[0]);
    assert_eq!(database.check(Direction::Outbound, &flow(1), Some(classes[0])), Verdict::Pass);
    assert!(matches!(database.bypass(flow(1), None, ignore()), Err(LatchError::Exists(_))));
    let latch = database.bypass(flow(2), None, ignore()).unwrap();
    assert_eq!(verdicts(&database, &flow(2), Some(classes[0])), [Verdict::Drop; 2]);
    database.release(latch);
}

#[test]
fn a_bypass_that_the_system_refuses_leaves_nothing() {
    for alone in [false, true] {
        let (database, classes, barrier, spd) = system(alone);
        install(&database, 1, classes[0]);
        spd.refuses.store(true, Ordering::SeqCst);
        assert!(matches!(database.bypass(flow(1), None, ignore()), Err(LatchError::Unenforced { .. })));
        assert_eq!(verdicts(&database, &flow(1), Some(classes[0])), [Verdict::Pass; 2], "as before");
        assert_ne!(barrier.passage(&flow(1)), Some(Passage::Clear));
        spd.refuses.store(false, Ordering::SeqCst);
        barrier.refuses.store(true, Ordering::SeqCst);
        let bypassed = database.bypass(flow(2), None, ignore());
        // Without the system's barrier the packet check and routing do it alone, where they see all packets.
        assert_eq!(matches!(bypassed, Err(LatchError::Unenforced { .. })), alone);
        assert_eq!(bypassed.ok().and_then(|latch| database.protector(latch)), (!alone).then_some(Protector::Engine));
    }
}

#[test]
fn what_a_shunt_drops_is_not_bypassed() {
    let (database, classes, barrier, spd) = system(false);
    install(&database, 1, classes[0]);
    database.shunted(1, shunt(ShuntAction::Pass, 1));
    database.shunted(2, shunt(ShuntAction::Drop, 1));
    let error = database.bypass(flow(1), None, ignore()).unwrap_err();
    assert_eq!(error, LatchError::Policy { flow: flow(1).to_string(), what: "the shunt aside drops it".to_owned() });
    database.unshunted(2);
    let (holder, told) = counting();
    let latch = database.bypass(flow(1), None, holder).unwrap();
    let other = database.bypass(flow(2), None, ignore()).unwrap();
    // RFC 5660 §2.2: the policy changes.
    database.shunted(3, shunt(ShuntAction::Drop, 1));
    assert_eq!(told.load(Ordering::SeqCst), 1);
    assert_eq!(database.inquire(latch).unwrap().state, LatchState::Broken);
    assert_eq!(database.inquire(other).unwrap().state, LatchState::Established);
    assert_eq!(verdicts(&database, &flow(1), None), [Verdict::Drop; 2]);
    assert_eq!(verdicts(&database, &flow(1), Some(classes[0])), [Verdict::Drop; 2]);
    assert_eq!(barrier.passage(&flow(1)), Some(Passage::None));
    assert_eq!(*spd.bypassed.lock().unwrap(), [flow(2)].into());
    database.unshunted(3);
    assert_eq!(database.inquire(latch).unwrap().state, LatchState::Broken, "its connection was reset");
}

#[test]
fn the_administrator_the_end_of_the_connection_and_the_daemon_s_end_a_bypass() {
    let (database, classes, barrier, spd) = system(true);
    install(&database, 1, classes[0]);
    let told = Arc::new(Mutex::new(Vec::new()));
    let latches: Vec<LatchId> = (0..5)
        .map(|n| {
            let told = Arc::clone(&told);
            let holder =
                Box::new(move |alert: Alert| told.lock().unwrap().push((alert.flow, alert.state, alert.reason)));
            database.bypass(flow(n), None, holder).unwrap()
        })
        .collect();
    assert!(database.break_latch(latches[0], "by hand") && !database.break_latch(LatchId(999), "nothing"));
    assert!(database.close(latches[1], "by hand") && database.close(latches[0], "after all"));
    database.ended(&latches[2..3]);
    // Somebody else's policy goes before the barrier.
    *barrier.passed_by.lock().unwrap() = vec![flow(3)];
    database.verify_barrier();
    database.close_bypasses();
    database.close_bypasses();
    let told = std::mem::take(&mut *told.lock().unwrap());
    let states: Vec<(Flow, LatchState)> = told.iter().map(|(flow, state, _)| (*flow, *state)).collect();
    let (broken, closed) = (LatchState::Broken, LatchState::Closed);
    let expected = [(0, broken), (1, closed), (0, closed), (2, closed), (3, broken), (3, closed), (4, closed)];
    assert_eq!(states, expected.map(|(n, state)| (flow(n), state)));
    assert_eq!(told[3].2, ENDED);
    for n in 0..5 {
        assert_eq!(barrier.passage(&flow(n)), Some(Passage::None));
        for class in [None, Some(classes[0])] {
            assert_eq!(verdicts(&database, &flow(n), class), [Verdict::Drop; 2]);
        }
    }
    assert!(spd.bypassed.lock().unwrap().is_empty());
}
