//! Workers that are child processes.
//!
//! One attendant task per process owns everything about it: the process handle, the control
//! socket, the output pipes, the ledger of held deliveries, the pulse. When the process ends, the
//! order is: its group is killed (nothing of it acts on), the exit is read, what it had written to
//! the control socket is read to the last byte, what it held is given back, and only then the loop
//! is told.

mod output;
mod spawn;

use std::io;
use std::os::fd::AsFd as _;
use std::time::Duration;

use rustix::net::{RecvFlags, SendFlags};
use rustix::process::{Pid, Signal, WaitId, WaitIdOptions};
use tokio::io::Interest;
use tokio::sync::mpsc;
use tokio::time::Instant;

use crate::control::{
    CONTROL_VERSION, FrameReader, StartFrame, TO_PARENT_BYTES_MAX, ToChild, ToParent, encode,
};
use crate::exit::{Circumstances, KillReason, RawExit, WorkerExit, classify};
use crate::ledger::{SharedLedger, lock};
use crate::plan::{Limits, ProcessProgram, RolePlan};
use crate::pulse::{Beat, Pulse};
use crate::runner::{Incarnation, Order, What};
use crate::{Error, procfs};
use output::Outputs;
use spawn::Spawned;

/// A process whose control socket is closed is about to end; if it does not, it has closed a
/// descriptor that is not its own.
const CONTROL_CLOSED_GRACE: Duration = Duration::from_secs(1);
/// Bytes that wait for a worker that does not read. Above it no ping is added; it will be found
/// unresponsive.
const PENDING_BYTES_MAX: usize = 8 * 1024 * 1024;
/// Read in one go, in bytes.
const CHUNK_BYTES: usize = 16 * 1024;
/// Bytes of control messages read after a death. A socket's buffer holds far less.
const LAST_BYTES_MAX: usize = 8 * 1024 * 1024;

/// A worker process with its attendant's state.
pub(crate) struct ProcessWorker {
    incarnation: Incarnation,
    limits: Limits,
    child: Spawned,
    outputs: Outputs,
    pending: Vec<u8>,
    frames: FrameReader,
    ledger: SharedLedger,
    orders: mpsc::Receiver<Order>,
    pulse: Pulse,
    next_tick: Instant,
    /// Set once the control socket is closed: until when the process has to be gone.
    closed: Option<Instant>,
    killed: Option<KillReason>,
    draining: bool,
    reaped: bool,
    oom_kills_before: Option<u64>,
    /// Lines of the tail that earlier incarnations wrote.
    lines_before: u64,
}

/// What the attendant woke up for.
enum Turn {
    Died,
    ControlReadable,
    ControlWritable,
    Output(output::Ready),
    Order(Order),
    /// The time for which it was due.
    Due(Instant),
}

impl ProcessWorker {
    /// Forks and execs; to be called on the thread that lives as long as the daemon, because the
    /// child dies with the thread that made it.
    pub fn start(
        incarnation: Incarnation,
        plan: &RolePlan,
        program: &ProcessProgram,
        orders: mpsc::Receiver<Order>,
    ) -> Result<Self, Error> {
        let key = incarnation.key;
        let (child, outputs) = spawn::spawn(key, plan, program)?;
        let context = &incarnation.context;
        let ledger = context.ledgers.open(key);
        let now = Instant::now();
        let mut worker = Self {
            limits: plan.limits,
            outputs,
            pending: Vec::new(),
            frames: FrameReader::new(TO_PARENT_BYTES_MAX),
            ledger,
            orders,
            pulse: Pulse::new(context.unresponsive, context.loading),
            next_tick: now,
            closed: None,
            killed: None,
            draining: false,
            reaped: false,
            lines_before: incarnation.tail.total(),
            oom_kills_before: procfs::oom_kills(),
            child,
            incarnation,
        };
        worker.say(&ToChild::Start(StartFrame {
            version: CONTROL_VERSION,
            role: key.role,
            index: key.index,
            node: worker.incarnation.context.node.clone(),
            incarnation: worker.incarnation.number,
            config: plan.config.clone(),
            listeners: plan.listeners.iter().map(|l| l.name().to_owned()).collect(),
        }));
        Ok(worker)
    }

    pub fn pid(&self) -> u32 {
        self.child.pid.as_raw_nonzero().get().unsigned_abs()
    }

    /// Serves the process until it has ended and what it held is given back.
    pub async fn attend(mut self) {
        loop {
            match self.turn().await {
                Turn::Died => break,
                Turn::ControlReadable => self.read_control().await,
                Turn::ControlWritable => self.write_pending(),
                Turn::Output(ready) => {
                    let pid = self.pid();
                    self.outputs.read(ready, &self.incarnation, pid);
                }
                Turn::Order(order) => self.obey(order),
                Turn::Due(due) => self.beat(due),
            }
        }
        self.bury().await;
    }

    async fn turn(&mut self) -> Turn {
        let due = self.due();
        let control = &self.child.control;
        tokio::select! {
            biased;
            _ = self.child.pidfd.readable() => Turn::Died,
            Some(order) = self.orders.recv() => Turn::Order(order),
            () = tokio::time::sleep_until(due), if self.killed.is_none() => Turn::Due(due),
            _ = control.readable(), if self.closed.is_none() => Turn::ControlReadable,
            _ = control.writable(), if !self.pending.is_empty() => Turn::ControlWritable,
            ready = self.outputs.ready() => Turn::Output(ready),
        }
    }

    fn due(&self) -> Instant {
        let others = [self.pulse.deadline(), self.closed];
        others
            .into_iter()
            .flatten()
            .fold(self.next_tick, Instant::min)
    }

    fn beat(&mut self, due: Instant) {
        let now = Instant::now();
        if self.closed.is_some_and(|until| now >= until) {
            let detail = "it closed its control socket and went on".to_owned();
            self.kill(KillReason::BrokenControl { detail });
        }
        match self.pulse.on_tick(due, now) {
            Beat::Ping(n) if self.pending.len() < PENDING_BYTES_MAX => {
                self.say(&ToChild::Ping { n })
            }
            Beat::Ping(_) | Beat::Wait => {}
            Beat::Stalled(silent_for) => self.kill(KillReason::Unresponsive { silent_for }),
        }
        if due >= self.next_tick {
            let context = &self.incarnation.context;
            let interval = Pulse::interval(context.unresponsive);
            let passed = now.duration_since(context.epoch).div_duration_f64(interval) as u32;
            self.next_tick = context.epoch + interval * (passed + 1);
        }
    }

    fn obey(&mut self, order: Order) {
        match order {
            Order::Drain => {
                self.draining = true;
                self.say(&ToChild::Drain);
            }
            Order::Reload(config) => self.say(&ToChild::Reload { config }),
            Order::Kill(reason) => self.kill(reason),
        }
    }

    /// SIGKILL to the whole group, stopped processes included. The exit follows.
    fn kill(&mut self, reason: KillReason) {
        if self.killed.is_none() {
            tracing::warn!(worker = %self.incarnation.key, pid = self.pid(), ?reason, "killing a worker");
            self.killed = Some(reason);
            kill_group(self.child.pid);
        }
    }

    fn say(&mut self, message: &ToChild) {
        if self.closed.is_none() {
            encode(message, &mut self.pending);
            self.write_pending();
        }
    }

    /// Asks the kernel first, since the runtime may not know yet that there is room; then the
    /// runtime, so that it knows when there is none.
    fn write_pending(&mut self) {
        let control = &self.child.control;
        let pending = &mut self.pending;
        let mut write = || {
            while !pending.is_empty() {
                let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
                match rustix::net::send(control, pending, flags) {
                    Ok(count) => drop(pending.drain(..count)),
                    Err(rustix::io::Errno::INTR) => {}
                    Err(rustix::io::Errno::AGAIN) => return Err(io::ErrorKind::WouldBlock.into()),
                    // Closed: the reading side notices too and decides.
                    Err(_) => pending.clear(),
                }
            }
            Ok(())
        };
        if write().is_err() {
            let _ = control.try_io(Interest::WRITABLE, write);
        }
    }

    async fn read_control(&mut self) {
        let mut chunk = [0; CHUNK_BYTES];
        match self.child.control.try_read(&mut chunk) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Ok(count @ 1..) => {
                self.frames.push(&chunk[..count]);
                self.take_messages().await;
            }
            Ok(0) | Err(_) => self.closed = Some(Instant::now() + CONTROL_CLOSED_GRACE),
        }
    }

    async fn take_messages(&mut self) {
        loop {
            match self.frames.next() {
                Ok(None) => return,
                Ok(Some(message)) => self.take_message(message).await,
                Err(error) => {
                    self.kill(KillReason::BrokenControl {
                        detail: error.to_string(),
                    });
                    return;
                }
            }
        }
    }

    async fn take_message(&mut self, message: ToParent) {
        match message {
            ToParent::Held { deliveries } => {
                let lost = deliveries
                    .iter()
                    .filter(|token| !lock(&self.ledger).hold(token))
                    .count();
                if lost > 0 {
                    let (worker, held) = (self.incarnation.key, lock(&self.ledger).len());
                    tracing::warn!(%worker, lost, held, "deliveries not recorded: too many or too long");
                }
            }
            ToParent::Released { deliveries } => {
                for token in deliveries {
                    lock(&self.ledger).release(&token);
                }
            }
            ToParent::Pong { n } => self.pulse.on_pong(n),
            ToParent::Ready { .. } | ToParent::Waiting { .. } => {
                self.pulse.on_loaded(Instant::now());
                self.incarnation.tell_said(message).await;
            }
            ToParent::Note { .. } => self.incarnation.tell_said(message).await,
        }
    }

    /// Everything that a death asks for, in the order that the module header gives.
    async fn bury(mut self) {
        kill_group(self.child.pid);
        let raw = self.reap();
        self.read_last_messages().await;
        let held = lock(&self.ledger).take();
        let blame = self.exit(raw, false).blames_the_job();
        let pid = self.pid();
        let rest = self.incarnation.give_back(Some(pid), blame, held).await;

        self.outputs.finish(&self.incarnation, pid);
        let last_lines = self.incarnation.tail.lines_since(self.lines_before);
        let kernel_oom = procfs::oom_kills() > self.oom_kills_before;
        let exit = self.exit(raw, kernel_oom);
        self.incarnation
            .tell(What::Exited { exit, last_lines })
            .await;
        if let Some(rest) = rest {
            rest.await;
        }
    }

    fn reap(&mut self) -> RawExit {
        self.reaped = true;
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG;
        match rustix::process::waitid(WaitId::PidFd(self.child.pidfd.as_fd()), options) {
            Ok(Some(status)) => match (status.exit_status(), status.terminating_signal()) {
                (Some(code), _) => RawExit::Code(code),
                (None, Some(signal)) => RawExit::Signal {
                    signal,
                    core_dumped: status.dumped(),
                },
                (None, None) => RawExit::Unknown,
            },
            Ok(None) | Err(_) => RawExit::Unknown,
        }
    }

    /// What the process had written before it died is in the socket's buffer; the end of the
    /// stream is not waited for, a stray heir could hold it open.
    async fn read_last_messages(&mut self) {
        let mut chunk = [0; CHUNK_BYTES];
        let mut total = 0;
        while total < LAST_BYTES_MAX {
            match rustix::net::recv(&self.child.control, &mut chunk, RecvFlags::DONTWAIT) {
                Ok((count @ 1.., _)) => {
                    total += count;
                    self.frames.push(&chunk[..count]);
                    self.take_messages().await;
                }
                Err(rustix::io::Errno::INTR) => {}
                Ok((0, _)) | Err(_) => return,
            }
        }
    }

    fn exit(&self, raw: RawExit, kernel_oom: bool) -> WorkerExit {
        classify(Circumstances {
            raw,
            killed: self.killed.clone(),
            draining: self.draining,
            memory_limit_bytes: self.limits.memory_bytes,
            cpu_limit_seconds: self.limits.cpu_seconds,
            kernel_oom,
            words: &self.outputs.words,
        })
    }
}

/// Until the process is reaped, its id cannot become another group's.
fn kill_group(pid: Pid) {
    match rustix::process::kill_process_group(pid, Signal::KILL) {
        Ok(()) | Err(rustix::io::Errno::SRCH) => {}
        Err(errno) => tracing::error!(?pid, %errno, "cannot kill a worker's process group"),
    }
}

impl Drop for ProcessWorker {
    /// Only if the supervisor itself is dropped with the process still running: no orphans.
    fn drop(&mut self) {
        if !self.reaped {
            kill_group(self.child.pid);
        }
    }
}
