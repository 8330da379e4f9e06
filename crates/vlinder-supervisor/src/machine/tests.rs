//! Tables and stories for the decisions. No clock runs: time is what a test says.

use proptest::prelude::*;

use super::*;

const SECRET: WorkerRole = WorkerRole::Secret;
const STATE: WorkerRole = WorkerRole::State;
const HARNESS: WorkerRole = WorkerRole::Harness;
const OLLAMA: WorkerRole = WorkerRole::InferenceOllama;

fn key(role: WorkerRole, index: u32) -> WorkerKey {
    WorkerKey { role, index }
}

fn crash() -> WorkerExit {
    WorkerExit::Signalled {
        signal: 9,
        core_dumped: false,
    }
}

/// A machine and its clock.
struct Bed {
    machine: Machine,
    now: Instant,
}

impl Bed {
    fn new(order: &[&[WorkerRole]], counts: &[(WorkerRole, u32)]) -> Self {
        let order: Vec<_> = order.iter().map(|stage| stage.to_vec()).collect();
        let mut machine = Machine::new(Policy::default(), &order, &[], 1);
        for &(role, count) in counts {
            machine.scale(role, count);
        }
        Self {
            machine,
            now: Instant::now(),
        }
    }

    fn reconcile(&mut self) -> Vec<Action> {
        self.machine.reconcile(self.now)
    }

    /// Lets time pass; reconciles whenever it is due.
    fn pass(&mut self, time: Duration) -> Vec<Action> {
        let end = self.now + time;
        let mut actions = self.reconcile();
        while let Some(due) = self.machine.next_deadline().filter(|&due| due <= end) {
            self.now = self.now.max(due);
            let more = self.reconcile();
            assert!(
                !more.is_empty() || self.machine.next_deadline() != Some(due),
                "it would spin"
            );
            actions.extend(more);
        }
        self.now = end;
        actions
    }

    fn up(&mut self, key: WorkerKey) -> Vec<Action> {
        self.machine.on_up(key, self.now, Up::Ready);
        self.reconcile()
    }

    fn exit(&mut self, key: WorkerKey, exit: WorkerExit) -> Vec<Action> {
        self.machine.on_exit(key, exit, self.now)
    }

    fn phase(&self, key: WorkerKey) -> &Phase {
        &self.machine.slot(key).unwrap().phase
    }
}

fn spawned(actions: &[Action]) -> Vec<WorkerKey> {
    let spawn = |action: &Action| match action {
        Action::Spawn { key, .. } => Some(*key),
        _ => None,
    };
    actions.iter().filter_map(spawn).collect()
}

fn drained(actions: &[Action]) -> Vec<WorkerKey> {
    let drain = |action: &Action| match action {
        Action::Drain { key } => Some(*key),
        _ => None,
    };
    actions.iter().filter_map(drain).collect()
}

fn killed(actions: &[Action]) -> Vec<WorkerKey> {
    let kill = |action: &Action| match action {
        Action::Kill { key, .. } => Some(*key),
        _ => None,
    };
    actions.iter().filter_map(kill).collect()
}

const fn seconds(count: u64) -> Duration {
    Duration::from_secs(count)
}

#[test]
fn stages_start_one_after_the_other() {
    let mut bed = Bed::new(
        &[&[SECRET], &[STATE]],
        &[(OLLAMA, 2), (STATE, 1), (SECRET, 1)],
    );
    assert_eq!(spawned(&bed.reconcile()), [key(SECRET, 0)]);
    assert_eq!(bed.reconcile(), []);
    assert_eq!(spawned(&bed.up(key(SECRET, 0))), [key(STATE, 0)]);
    bed.machine.on_up(
        key(STATE, 0),
        bed.now,
        Up::Waiting {
            reason: "no disk".into(),
        },
    );
    assert_eq!(spawned(&bed.reconcile()), [key(OLLAMA, 0), key(OLLAMA, 1)]);
    bed.up(key(OLLAMA, 0));
    assert!(bed.machine.starting_stage().is_some());
    bed.up(key(OLLAMA, 1));
    assert_eq!(bed.machine.starting_stage(), None);
}

#[test]
fn a_start_that_hangs_is_shown_and_passed() {
    let mut bed = Bed::new(&[&[SECRET]], &[(SECRET, 1), (OLLAMA, 1)]);
    assert_eq!(spawned(&bed.pass(seconds(29))), [key(SECRET, 0)]);
    let actions = bed.pass(seconds(2));
    assert!(actions.contains(&Action::StartedLate { role: SECRET }));
    assert_eq!(spawned(&actions), [key(OLLAMA, 0)]);
}

#[test]
fn a_crash_loop_does_not_hold_the_start_up_and_is_said_once() {
    let mut bed = Bed::new(&[&[SECRET]], &[(SECRET, 1), (OLLAMA, 1)]);
    let mut actions = bed.reconcile();
    for _ in 0..12 {
        actions.extend(bed.exit(key(SECRET, 0), crash()));
        actions.extend(bed.pass(seconds(31)));
    }
    assert!(spawned(&actions).contains(&key(OLLAMA, 0)));
    assert_eq!(
        spawned(&actions)
            .iter()
            .filter(|key| key.role == SECRET)
            .count(),
        13
    );
    let gave_up = actions
        .iter()
        .filter(|action| matches!(action, Action::GaveUp { .. }));
    assert_eq!(gave_up.count(), 1);
}

#[test]
fn the_first_restart_is_immediate_and_later_ones_back_off() {
    let mut bed = Bed::new(&[], &[(OLLAMA, 1)]);
    let worker = key(OLLAMA, 0);
    bed.reconcile();
    assert_eq!(
        bed.exit(worker, crash()),
        [Action::Spawn {
            key: worker,
            incarnation: 2
        }]
    );
    assert_eq!(bed.exit(worker, crash()), []);
    assert!(matches!(
        bed.phase(worker),
        Phase::Resting {
            crash_looping: false,
            ..
        }
    ));
    assert_eq!(spawned(&bed.pass(Duration::from_millis(49))), []);
    assert_eq!(spawned(&bed.pass(Duration::from_millis(51))), [worker]);
}

#[test]
fn a_good_stretch_is_rewarded() {
    let mut bed = Bed::new(&[], &[(OLLAMA, 1)]);
    let worker = key(OLLAMA, 0);
    bed.reconcile();
    for _ in 0..50 {
        bed.up(worker);
        bed.pass(seconds(5));
        assert_eq!(spawned(&bed.exit(worker, crash())), [worker]);
    }
    // Long life without ever having been up is no good stretch.
    bed.pass(seconds(60));
    assert_eq!(spawned(&bed.exit(worker, crash())), []);
}

#[test]
fn a_configuration_error_is_retried_slowly_and_a_restart_retries_now() {
    let mut bed = Bed::new(&[], &[(OLLAMA, 1)]);
    let worker = key(OLLAMA, 0);
    bed.reconcile();
    bed.exit(
        worker,
        WorkerExit::Configuration {
            message: "bad".into(),
        },
    );
    assert!(matches!(
        bed.phase(worker),
        Phase::Resting {
            crash_looping: true,
            ..
        }
    ));
    assert_eq!(spawned(&bed.pass(seconds(14))), []);
    bed.machine.restart(OLLAMA);
    assert_eq!(spawned(&bed.reconcile()), [worker]);
    bed.exit(
        worker,
        WorkerExit::Configuration {
            message: "bad".into(),
        },
    );
    assert_eq!(spawned(&bed.pass(seconds(30))), [worker]);
}

#[test]
fn scaling_down_drains_the_highest_and_kills_at_the_deadline() {
    let mut bed = Bed::new(&[], &[(OLLAMA, 3)]);
    bed.reconcile();
    bed.machine.scale(OLLAMA, 1);
    assert_eq!(drained(&bed.reconcile()), [key(OLLAMA, 1), key(OLLAMA, 2)]);
    assert_eq!(bed.exit(key(OLLAMA, 1), WorkerExit::Drained), []);
    assert_eq!(killed(&bed.pass(seconds(29))), []);
    assert_eq!(killed(&bed.pass(seconds(60))), [key(OLLAMA, 2)]);
    bed.exit(key(OLLAMA, 2), WorkerExit::DrainDeadline);
    let left: Vec<_> = bed.machine.slots().map(|(key, _)| key).collect();
    assert_eq!(left, [key(OLLAMA, 0)]);
}

#[test]
fn scaling_up_again_while_one_leaves_replaces_it_when_it_is_gone() {
    let mut bed = Bed::new(&[], &[(OLLAMA, 1)]);
    bed.reconcile();
    bed.machine.scale(OLLAMA, 0);
    assert_eq!(drained(&bed.reconcile()), [key(OLLAMA, 0)]);
    bed.machine.scale(OLLAMA, 1);
    assert_eq!(bed.reconcile(), []);
    assert_eq!(
        spawned(&bed.exit(key(OLLAMA, 0), WorkerExit::Drained)),
        [key(OLLAMA, 0)]
    );
}

#[test]
fn restarts_roll() {
    let mut bed = Bed::new(&[], &[(HARNESS, 3)]);
    bed.reconcile();
    for index in 0..3 {
        bed.up(key(HARNESS, index));
    }
    bed.machine.restart(HARNESS);
    for index in 0..3 {
        assert_eq!(drained(&bed.reconcile()), [key(HARNESS, index)]);
        assert_eq!(bed.reconcile(), []);
        let actions = bed.exit(key(HARNESS, index), WorkerExit::Drained);
        assert_eq!(
            actions,
            [Action::Spawn {
                key: key(HARNESS, index),
                incarnation: 2
            }]
        );
        let next = drained(&bed.up(key(HARNESS, index)));
        // The next goes as soon as this one is up; put it back to be looked at above.
        if index < 2 {
            assert_eq!(next, [key(HARNESS, index + 1)]);
            bed.undo_drain(key(HARNESS, index + 1));
        } else {
            assert_eq!(next, []);
        }
    }
    assert!(bed.machine.slots().all(|(_, slot)| slot.failures == 0));
}

impl Bed {
    fn undo_drain(&mut self, key: WorkerKey) {
        let slot = self.machine.slots.get_mut(&key).unwrap();
        slot.restart = true;
        if let Phase::Running { leaving, .. } = &mut slot.phase {
            *leaving = None;
        }
    }
}

#[test]
fn a_drain_goes_backwards_and_restarts_nobody() {
    let mut bed = Bed::new(
        &[&[SECRET], &[HARNESS]],
        &[(SECRET, 1), (HARNESS, 1), (OLLAMA, 1)],
    );
    for role in [SECRET, HARNESS, OLLAMA] {
        bed.reconcile();
        bed.up(key(role, 0));
    }
    bed.machine.begin_drain(bed.now, bed.now + seconds(10));
    assert_eq!(drained(&bed.reconcile()), [key(OLLAMA, 0)]);
    assert_eq!(
        drained(&bed.exit(key(OLLAMA, 0), WorkerExit::Drained)),
        [key(HARNESS, 0)]
    );
    assert_eq!(
        drained(&bed.exit(key(HARNESS, 0), crash())),
        [key(SECRET, 0)]
    );
    assert!(!bed.machine.is_finished());
    bed.exit(key(SECRET, 0), WorkerExit::Drained);
    assert!(bed.machine.is_finished());
    assert_eq!(bed.pass(seconds(600)), []);
    assert_eq!(bed.machine.slots().count(), 3);
}

#[test]
fn a_drain_kills_in_time_stage_by_stage() {
    let mut bed = Bed::new(&[&[SECRET], &[HARNESS]], &[(SECRET, 1), (HARNESS, 1)]);
    bed.reconcile();
    bed.up(key(SECRET, 0));
    bed.up(key(HARNESS, 0));
    bed.machine.begin_drain(bed.now, bed.now + seconds(10));
    // Half a second is kept for the stage to come.
    assert_eq!(killed(&bed.pass(Duration::from_millis(9_400))), []);
    assert_eq!(
        killed(&bed.pass(Duration::from_millis(200))),
        [key(HARNESS, 0)]
    );
    let actions = bed.exit(key(HARNESS, 0), WorkerExit::DrainDeadline);
    assert_eq!(drained(&actions), [key(SECRET, 0)]);
    assert_eq!(killed(&bed.pass(Duration::from_millis(390))), []);
    assert_eq!(
        killed(&bed.pass(Duration::from_millis(20))),
        [key(SECRET, 0)]
    );
}

#[test]
fn a_second_drain_ends_everything_now() {
    let mut bed = Bed::new(&[&[SECRET], &[HARNESS]], &[(SECRET, 1), (HARNESS, 1)]);
    bed.reconcile();
    bed.up(key(SECRET, 0));
    bed.up(key(HARNESS, 0));
    bed.machine.begin_drain(bed.now, bed.now + seconds(600));
    bed.reconcile();
    bed.machine.begin_drain(bed.now, bed.now + seconds(600));
    let actions = bed.pass(Duration::ZERO);
    // The secret service is still told to drain, before it is killed with the next breath.
    assert_eq!(killed(&actions), [key(HARNESS, 0), key(SECRET, 0)]);
    assert!(actions.iter().all(|action| match action {
        Action::Kill { reason, .. } => *reason == KillReason::Now,
        _ => true,
    }));
}

#[test]
fn a_drain_during_the_start_starts_nobody_any_more() {
    let mut bed = Bed::new(&[&[SECRET]], &[(SECRET, 1), (OLLAMA, 1)]);
    bed.reconcile();
    bed.machine.begin_drain(bed.now, bed.now + seconds(5));
    let actions = bed.reconcile();
    assert_eq!(
        (drained(&actions), spawned(&actions)),
        (vec![key(SECRET, 0)], vec![])
    );
    assert_eq!(spawned(&bed.exit(key(SECRET, 0), WorkerExit::Drained)), []);
    assert!(bed.machine.is_finished());
}

#[derive(Debug, Clone)]
enum Step {
    Scale(WorkerRole, u32),
    Restart(WorkerRole),
    Crash(usize),
    Drained(usize),
    Up(usize),
    Pass(u64),
}

fn step() -> impl Strategy<Value = Step> {
    let role = prop::sample::select(vec![SECRET, STATE, HARNESS, OLLAMA]);
    prop_oneof![
        (role.clone(), 0u32..4).prop_map(|(role, count)| Step::Scale(role, count)),
        role.prop_map(Step::Restart),
        (0usize..16).prop_map(Step::Crash),
        (0usize..16).prop_map(Step::Drained),
        (0usize..16).prop_map(Step::Up),
        (0u64..40_000).prop_map(Step::Pass),
    ]
}

proptest! {
    /// Whatever happens, once it stops happening exactly the desired workers run.
    #[test]
    fn it_converges(steps in prop::collection::vec(step(), 0..60)) {
        let mut bed = Bed::new(&[&[SECRET], &[STATE]], &[(SECRET, 1), (STATE, 2), (HARNESS, 1)]);
        // The world outside: what was told to start and has not ended.
        let mut alive: BTreeMap<WorkerKey, u64> = BTreeMap::new();
        let mut leaving: BTreeSet<WorkerKey> = BTreeSet::new();
        let mut obey = |actions: Vec<Action>, alive: &mut BTreeMap<WorkerKey, u64>| {
            for action in actions {
                match action {
                    Action::Spawn { key, incarnation } => {
                        assert_eq!(alive.insert(key, incarnation), None, "{key} runs twice");
                        leaving.remove(&key);
                    }
                    Action::Drain { key } | Action::Kill { key, .. } => {
                        assert!(alive.contains_key(&key), "{key} does not run");
                        leaving.insert(key);
                    }
                    Action::GaveUp { .. } | Action::StartedLate { .. } => {}
                }
            }
            leaving.clone()
        };
        obey(bed.reconcile(), &mut alive);
        let nth = |alive: &BTreeMap<WorkerKey, u64>, n: usize| alive.keys().nth(n % alive.len().max(1)).copied();
        for step in steps {
            let actions = match step {
                Step::Scale(role, count) => { bed.machine.scale(role, count); bed.reconcile() }
                Step::Restart(role) => { bed.machine.restart(role); bed.reconcile() }
                Step::Crash(n) => match nth(&alive, n) {
                    Some(key) => { alive.remove(&key); bed.exit(key, crash()) }
                    None => vec![],
                },
                Step::Drained(n) => match nth(&alive, n) {
                    Some(key) => { alive.remove(&key); bed.exit(key, WorkerExit::Drained) }
                    None => vec![],
                },
                Step::Up(n) => match nth(&alive, n) {
                    Some(key) => bed.up(key),
                    None => vec![],
                },
                Step::Pass(ms) => bed.pass(Duration::from_millis(ms)),
            };
            obey(actions, &mut alive);
        }
        for _ in 0..40 {
            let gone = obey(bed.pass(seconds(40)), &mut alive);
            for key in gone {
                if alive.remove(&key).is_some() {
                    obey(bed.exit(key, WorkerExit::Drained), &mut alive);
                }
            }
            for key in alive.keys().copied().collect::<Vec<_>>() {
                obey(bed.up(key), &mut alive);
            }
        }
        let desired = bed.machine.desired().clone();
        let wanted: Vec<_> = desired
            .iter()
            .flat_map(|(&role, &count)| (0..count).map(move |index| key(role, index)))
            .collect();
        let running: Vec<_> = alive.keys().copied().collect();
        prop_assert_eq!(running, wanted);
        prop_assert_eq!(bed.machine.starting_stage(), None);
    }
}
