//! The loop: facts in, actions performed, status out.

mod snapshot;

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use tokio::sync::{mpsc, watch};
use tokio::task::{self, JoinError, JoinSet};
use tokio::time::Instant;
use vlinder_core::WorkerRole;

use crate::exit::{Verdict, WorkerExit};
use crate::handle::{COMMANDS_MAX, Command};
use crate::ledger::Ledgers;
use crate::machine::{Action, Machine};
use crate::orphans::Orphans;
use crate::plan::{Options, Plan, Program, RolePlan, check_count};
use crate::process::ProcessWorker;
use crate::runner::{Context, EVENTS_MAX, Event, Incarnation, ORDERS_MAX, Order, What, put_note};
use crate::task::TaskWorker;
use crate::{
    DrainReport, Error, ExitRecord, HeldDeliveries, LogSink, NodePhase, NodeStatus,
    SupervisorHandle, Tail, WorkerKey,
};

/// The reconcile pass runs at least this often, whatever happens: the way back from a surprise.
const RECONCILE_INTERVAL: Duration = Duration::from_secs(10);
/// After its deadline the drain waits this long for the killed to be gone.
const KILL_GRACE: Duration = Duration::from_secs(2);
/// After the drain: for deliveries to be given back and orphans to end.
const CLOSING_DEADLINE: Duration = Duration::from_secs(2);

/// The edges of the supervisor.
pub struct Deps {
    /// Takes back what dead workers held.
    pub held: Arc<dyn HeldDeliveries>,
    /// Takes the output of worker processes.
    pub log: Arc<dyn LogSink>,
}

/// Supervises the workers of one node. See the crate's header.
pub struct Supervisor {
    node: String,
    machine: Machine,
    plans: BTreeMap<WorkerRole, RolePlan>,
    workers: BTreeMap<WorkerKey, Worker>,
    context: Arc<Context>,
    attendants: JoinSet<()>,
    /// Whom each of them attends to.
    attending: HashMap<task::Id, (WorkerKey, u64)>,
    endings: BTreeMap<(WorkerRole, &'static str), u64>,
    commands: mpsc::Receiver<Command>,
    events: mpsc::Receiver<Event>,
    status: watch::Sender<Arc<NodeStatus>>,
    orphans: Option<Orphans>,
    late: Vec<WorkerRole>,
    killed: usize,
    drain_deadline: Option<Instant>,
}

/// What is known of a worker beyond the machine's state.
#[derive(Default)]
struct Worker {
    /// None when nothing runs.
    orders: Option<mpsc::Sender<Order>>,
    pid: Option<u32>,
    started_at: Option<SystemTime>,
    last_exit: Option<ExitRecord>,
    tail: Tail,
    addresses: BTreeMap<String, String>,
    notes: BTreeMap<String, String>,
}

enum Wake {
    Command(Command),
    Event(Event),
    /// An attendant has ended, after its worker or by a panic of its own.
    Attendant(Result<task::Id, JoinError>),
    Orphans,
    Time,
}

impl Supervisor {
    /// Checks the plan; nothing is started yet. To be called on the runtime that runs it.
    pub fn new(options: Options, deps: Deps) -> Result<(Self, SupervisorHandle), Error> {
        options.plan.check()?;
        let orphans = options.adopt_orphans.then(Orphans::adopt).transpose()?;
        let (commands_sender, commands) = mpsc::channel(COMMANDS_MAX);
        let (events_sender, events) = mpsc::channel(EVENTS_MAX);
        let ledgers = Ledgers::default();
        let context = Arc::new(Context {
            node: options.node.clone(),
            unresponsive: options.policy.unresponsive,
            loading: options
                .policy
                .start_deadline
                .max(options.policy.unresponsive),
            epoch: Instant::now(),
            held: deps.held,
            ledgers: ledgers.clone(),
            log: deps.log,
            events: events_sender,
        });
        let Options {
            node,
            plan,
            start_order,
            drain_order,
            policy,
            seed,
            ..
        } = options;
        let mut machine = Machine::new(policy, &start_order, &drain_order, seed);
        for role in &plan.roles {
            machine.scale(role.role, role.count);
        }
        let first = NodeStatus {
            node: node.clone(),
            phase: NodePhase::Starting { stage: 0 },
            late: Vec::new(),
            desired: machine.desired().clone(),
            endings: BTreeMap::new(),
            workers: Vec::new(),
        };
        let (status, status_receiver) = watch::channel(Arc::new(first));
        let supervisor = Self {
            node,
            machine,
            plans: plan
                .roles
                .into_iter()
                .map(|plan| (plan.role, plan))
                .collect(),
            workers: BTreeMap::new(),
            context,
            attendants: JoinSet::new(),
            attending: HashMap::new(),
            endings: BTreeMap::new(),
            commands,
            events,
            status,
            orphans,
            late: Vec::new(),
            killed: 0,
            drain_deadline: None,
        };
        let handle = SupervisorHandle {
            commands: commands_sender,
            status: status_receiver,
            ledgers,
        };
        Ok((supervisor, handle))
    }

    /// Runs until it was drained. On a current-thread runtime, on a thread that lives as long as
    /// the daemon: worker processes die with the thread that made them.
    pub async fn run(mut self) -> DrainReport {
        let actions = self.machine.reconcile(Instant::now());
        self.settle(actions);
        while !self.is_over() {
            let wake = self.wake().await;
            let actions = self.take(wake);
            self.settle(actions);
        }
        self.close().await
    }

    async fn wake(&mut self) -> Wake {
        let timer = Instant::now() + RECONCILE_INTERVAL;
        let give_up = self.drain_deadline.map(|deadline| deadline + KILL_GRACE);
        let due = [self.machine.next_deadline(), give_up]
            .into_iter()
            .flatten()
            .fold(timer, Instant::min);
        let orphans = self.orphans.as_mut();
        tokio::select! {
            biased;
            Some(event) = self.events.recv() => Wake::Event(event),
            Some(command) = self.commands.recv() => Wake::Command(command),
            Some(result) = self.attendants.join_next_with_id() => Wake::Attendant(result.map(|(id, ())| id)),
            () = async { orphans.expect("guarded").due().await }, if orphans.is_some() => Wake::Orphans,
            () = tokio::time::sleep_until(due) => Wake::Time,
        }
    }

    fn take(&mut self, wake: Wake) -> Vec<Action> {
        let now = Instant::now();
        match wake {
            Wake::Event(event) => return self.on_event(event, now),
            Wake::Command(command) => self.on_command(command, now),
            Wake::Attendant(result) => return self.on_attendant_gone(result, now),
            Wake::Orphans | Wake::Time => {}
        }
        if let Some(orphans) = &mut self.orphans {
            let workers = &self.workers;
            orphans.sweep(|pid| workers.values().any(|worker| worker.pid == Some(pid)));
        }
        self.machine.reconcile(now)
    }

    /// An attendant that panicked (an edge did, most likely) has killed its worker on the way out,
    /// but told nobody.
    fn on_attendant_gone(
        &mut self,
        result: Result<task::Id, JoinError>,
        now: Instant,
    ) -> Vec<Action> {
        let id = result.as_ref().map_or_else(JoinError::id, |id| *id);
        let Some((key, incarnation)) = self.attending.remove(&id) else {
            return vec![];
        };
        let Err(error) = result else { return vec![] };
        tracing::error!(worker = %key, %error, "the attendant of a worker failed");
        let what = What::Exited {
            exit: WorkerExit::Lost,
            last_lines: vec![],
        };
        self.on_event(
            Event {
                key,
                incarnation,
                what,
            },
            now,
        )
    }

    fn on_event(&mut self, event: Event, now: Instant) -> Vec<Action> {
        let Event {
            key,
            incarnation,
            what,
        } = event;
        let current = self
            .machine
            .slot(key)
            .is_some_and(|slot| slot.incarnation == incarnation);
        let Some(worker) = self.workers.get_mut(&key).filter(|_| current) else {
            return vec![];
        };
        match what {
            What::Up { state, addresses } => {
                worker.addresses = addresses;
                self.machine.on_up(key, now, state);
                self.machine.reconcile(now)
            }
            What::Note { key: name, value } => {
                put_note(&mut worker.notes, name, value);
                Vec::new()
            }
            What::Exited { exit, last_lines } => {
                worker.forget_incarnation();
                self.on_exit(key, exit, last_lines, now)
            }
        }
    }

    fn on_exit(
        &mut self,
        key: WorkerKey,
        exit: WorkerExit,
        last_lines: Vec<String>,
        now: Instant,
    ) -> Vec<Action> {
        match exit.verdict() {
            Verdict::Expected => tracing::info!(worker = %key, %exit, "worker ended"),
            Verdict::Retry | Verdict::RetrySlowly => {
                tracing::warn!(worker = %key, %exit, "worker died")
            }
        }
        *self.endings.entry((key.role, exit.kind())).or_default() += 1;
        let worker = self.workers.entry(key).or_default();
        let last_lines = last_lines.into();
        worker.last_exit = Some(ExitRecord {
            exit: exit.clone(),
            at: SystemTime::now(),
            last_lines,
        });
        self.machine.on_exit(key, exit, now)
    }

    fn on_command(&mut self, command: Command, now: Instant) {
        // A caller that no longer waits for the answer has given its order all the same.
        match command {
            Command::Scale { role, count, done } => drop(done.send(self.scale(role, count))),
            Command::Restart { role, done } => drop(done.send(self.restart(role))),
            Command::Reload { plan, done } => drop(done.send(self.reload(plan))),
            Command::Drain { within } => {
                self.machine.begin_drain(now, now + within);
                let until = self.drain_deadline.map_or(now + within, |_| now);
                self.drain_deadline = Some(until);
            }
        }
    }

    fn scale(&mut self, role: WorkerRole, count: u32) -> Result<(), Error> {
        self.refuse_while_draining()?;
        check_count(role, count)?;
        if !self.plans.contains_key(&role) {
            return Err(Error::UnknownRole(role));
        }
        self.machine.scale(role, count);
        Ok(())
    }

    fn restart(&mut self, role: WorkerRole) -> Result<(), Error> {
        self.refuse_while_draining()?;
        if !self.plans.contains_key(&role) {
            return Err(Error::UnknownRole(role));
        }
        self.machine.restart(role);
        Ok(())
    }

    fn reload(&mut self, plan: Plan) -> Result<(), Error> {
        self.refuse_while_draining()?;
        plan.check()?;
        let mut new: BTreeMap<_, _> = plan
            .roles
            .into_iter()
            .map(|plan| (plan.role, plan))
            .collect();
        for (role, old) in &self.plans {
            match new.get(role) {
                None => self.machine.scale(*role, 0),
                Some(new) if old.needs_restart(new) => self.machine.restart(*role),
                Some(new) if old.config != new.config => {
                    self.send(*role, || Order::Reload(new.config.clone()));
                }
                Some(_) => {}
            }
        }
        for (role, plan) in &new {
            // A live scale outlives a reload that does not touch the count.
            if self
                .plans
                .get(role)
                .is_none_or(|old| old.count != plan.count)
            {
                self.machine.scale(*role, plan.count);
            }
        }
        // The plan of a role that is gone is kept until its workers are: none is started from it.
        let old = std::mem::take(&mut self.plans);
        new.extend(
            old.into_iter()
                .filter(|(role, _)| !new.contains_key(role))
                .collect::<Vec<_>>(),
        );
        self.plans = new;
        Ok(())
    }

    fn refuse_while_draining(&self) -> Result<(), Error> {
        if self.machine.is_draining() {
            Err(Error::Stopping)
        } else {
            Ok(())
        }
    }

    fn send(&self, role: WorkerRole, order: impl Fn() -> Order) {
        for (key, worker) in self.workers.iter().filter(|(key, _)| key.role == role) {
            worker.give(*key, order());
        }
    }

    /// Performs actions, and those that follow from a failed start, then shows the result.
    fn settle(&mut self, mut actions: Vec<Action>) {
        while !actions.is_empty() {
            let batch = std::mem::take(&mut actions);
            for action in batch {
                actions.extend(self.perform(action));
            }
        }
        let machine = &self.machine;
        self.workers.retain(|key, _| machine.slot(*key).is_some());
        self.set_listeners();
        self.status.send_replace(Arc::new(self.snapshot()));
    }

    fn perform(&mut self, action: Action) -> Vec<Action> {
        match action {
            Action::Spawn { key, incarnation } => {
                if let Err(error) = self.spawn(key, incarnation) {
                    let reason = describe(&error);
                    return self.on_exit(
                        key,
                        WorkerExit::CouldNotStart { reason },
                        vec![],
                        Instant::now(),
                    );
                }
            }
            Action::Drain { key } => self.give(key, Order::Drain),
            Action::Kill { key, reason } => {
                self.killed += 1;
                self.give(key, Order::Kill(reason));
            }
            Action::GaveUp { key, failures } => {
                let slow = self.machine.policy().slow_retry;
                let exit = self
                    .machine
                    .slot(key)
                    .and_then(|slot| slot.last_exit.as_ref());
                let exit = exit.map(ToString::to_string).unwrap_or_default();
                tracing::error!(worker = %key, failures, exit, retry_every = ?slow, "worker is crash-looping");
            }
            Action::StartedLate { role } => {
                let limit = self.machine.policy().start_deadline;
                tracing::warn!(%role, ?limit, "not up in time; the start goes on without it");
                self.late.push(role);
            }
        }
        Vec::new()
    }

    fn spawn(&mut self, key: WorkerKey, number: u64) -> Result<(), Error> {
        let plan = self
            .plans
            .get(&key.role)
            .ok_or(Error::UnknownRole(key.role))?;
        for listener in &plan.listeners {
            listener.open()?;
        }
        let worker = self.workers.entry(key).or_default();
        let context = self.context.clone();
        let incarnation = Incarnation {
            key,
            number,
            context,
            tail: worker.tail.clone(),
        };
        let (orders, taken) = mpsc::channel(ORDERS_MAX);
        let attendant = match &plan.program {
            Program::Process(program) => {
                let process = ProcessWorker::start(incarnation, plan, program, taken)?;
                worker.pid = Some(process.pid());
                tracing::info!(worker = %key, pid = process.pid(), incarnation = number, "worker started");
                self.attendants.spawn(process.attend()).id()
            }
            Program::Task(factory) => {
                let task = TaskWorker::start(incarnation, plan, factory, taken)?;
                self.attendants.spawn(task.attend()).id()
            }
        };
        self.attending.insert(attendant, (key, number));
        worker.orders = Some(orders);
        worker.started_at = Some(SystemTime::now());
        Ok(())
    }

    fn give(&self, key: WorkerKey, order: Order) {
        if let Some(worker) = self.workers.get(&key) {
            worker.give(key, order);
        }
    }

    /// Nobody will accept for a role without workers: its clients are to be refused, not kept.
    fn set_listeners(&self) {
        for (role, plan) in self
            .plans
            .iter()
            .filter(|(_, plan)| !plan.listeners.is_empty())
        {
            let desired = self
                .machine
                .desired()
                .get(role)
                .is_some_and(|&count| count > 0);
            let wanted = desired && !self.machine.is_draining();
            let mut slots = self.machine.slots().filter(|(key, _)| key.role == *role);
            if wanted || slots.any(|(_, slot)| slot.is_running()) {
                continue;
            }
            for listener in &plan.listeners {
                if let Err(error) = listener.close() {
                    tracing::error!(%role, %error, "cannot close a listener");
                }
            }
        }
    }

    fn is_over(&self) -> bool {
        let hopeless = self
            .drain_deadline
            .is_some_and(|at| Instant::now() >= at + KILL_GRACE);
        hopeless || self.machine.is_finished()
    }

    async fn close(mut self) -> DrainReport {
        let closing = async { while self.attendants.join_next().await.is_some() {} };
        if tokio::time::timeout(CLOSING_DEADLINE, closing)
            .await
            .is_err()
        {
            tracing::error!("some workers' deliveries could not be given back before the end");
        }
        let stuck = self
            .machine
            .slots()
            .filter(|(_, slot)| slot.is_running())
            .count();
        let orphans = match &mut self.orphans {
            Some(orphans) => orphans.finish(CLOSING_DEADLINE).await,
            None => 0,
        };
        let mut last = self.snapshot();
        last.phase = NodePhase::Stopped;
        self.status.send_replace(Arc::new(last));
        DrainReport {
            killed: self.killed,
            left: stuck.max(orphans),
        }
    }
}

impl Worker {
    fn give(&self, key: WorkerKey, order: Order) {
        let Some(orders) = &self.orders else { return };
        // A closed channel means that the worker is gone; its exit is on the way.
        if let Err(mpsc::error::TrySendError::Full(order)) = orders.try_send(order) {
            tracing::error!(worker = %key, ?order, "an attendant takes no orders; order dropped");
        }
    }

    fn forget_incarnation(&mut self) {
        self.orders = None;
        self.pid = None;
        self.started_at = None;
        self.addresses.clear();
        self.notes.clear();
    }
}

/// An error with its causes, on one line.
fn describe(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}
