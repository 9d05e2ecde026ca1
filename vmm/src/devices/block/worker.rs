//! Serves a disk's queues, all of them by one engine: requests are in flight together, and answered as they end.
//!
//! A flush covers what was answered before it came, since that has been done by then; what is in flight when it comes, it may
//! or may not cover (virtio 1.2, 5.2.6.2).

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};

use super::DEVICE;
use super::engine::{Ended, Engine};
use super::flight::{MAX_REQUESTS, Progress, Step, Window};
use super::request::{Extent, Request, Status};
use crate::memory::GuestRam;
use crate::virtio::{ActiveQueue, Fault, QueueError};

/// The most requests that are taken in one wake-up.
const REQUESTS_PER_WAKE: usize = 64;
/// What events of the engine are told by; those of queues by their numbers.
const ENGINE: u32 = u32::MAX;

/// Where the engine is between a worker and the next.
pub(super) type Parked = Arc<Mutex<Option<Engine>>>;

/// How what is written is kept.
#[derive(Debug, Clone)]
pub(super) struct Durability {
    /// Whether what is written may stay in caches until a flush, as the driver has it in the configuration space.
    pub(super) writeback: Arc<AtomicBool>,
    /// Whether the driver flushes at all.
    pub(super) flushes: bool,
}

/// What the worker is made from.
pub(super) struct Plan {
    pub(super) queues: Vec<ActiveQueue>,
    pub(super) disk: Extent,
    pub(super) durability: Durability,
    pub(super) ram: GuestRam,
    pub(super) fault: Fault,
    pub(super) parked: Parked,
}

/// A request that is in flight.
#[derive(Debug)]
struct Task {
    queue: usize,
    head: u16,
    request: Request,
    progress: Progress,
    /// What it takes of the window.
    bytes: usize,
}

pub(super) struct Server {
    plan: Plan,
    /// Until the worker ends.
    engine: Option<Engine>,
    window: Window,
    tasks: Vec<Option<Task>>,
    /// Slots without a task.
    free: Vec<u16>,
    /// Queues that have requests for which there was no room.
    waiting: Vec<bool>,
    /// Queues that have answers of which the driver was not told.
    answered: Vec<bool>,
    broken: bool,
}

impl Server {
    /// A worker, if the engine is there, which no other worker has then.
    pub(super) fn new(plan: Plan) -> Option<Self> {
        let engine = plan.parked.lock().unwrap_or_else(PoisonError::into_inner).take()?;
        let queues = plan.queues.len();
        Some(Self {
            plan,
            engine: Some(engine),
            window: Window::default(),
            tasks: (0..MAX_REQUESTS).map(|_| None).collect(),
            free: (0..MAX_REQUESTS as u16).rev().collect(),
            waiting: vec![false; queues],
            answered: vec![false; queues],
            broken: false,
        })
    }

    fn fail(&mut self, what: &dyn std::fmt::Display) {
        self.plan.fault.report(DEVICE, what);
        self.broken = true;
    }

    /// Takes requests of a queue, as far as there is room, and begins them.
    fn take(&mut self, number: usize) -> Result<(), QueueError> {
        self.plan.queues[number].disable_kicks()?;
        self.waiting[number] = false;
        for _ in 0..REQUESTS_PER_WAKE {
            let Some(slot) = self.free.last().copied() else {
                self.waiting[number] = true;
                return Ok(());
            };
            let queue = &mut self.plan.queues[number];
            let Some(chain) = queue.pop()? else {
                if queue.enable_kicks()? {
                    continue;
                }
                return Ok(());
            };
            let head = chain.head_index();
            let (request, work) = Request::of_chain(chain, &self.plan.ram, &self.plan.disk)?;
            let bytes = Progress::bytes(&work);
            if !self.window.enter(bytes) {
                // Read again when there is room; the driver gave it to the device, and may not change it.
                queue.undo_pop();
                self.waiting[number] = true;
                return Ok(());
            }
            self.free.pop();
            let progress = Progress::new(work);
            let task = Task { queue: number, head, request, progress, bytes };
            self.tasks[usize::from(slot)] = Some(task);
            self.go_on(slot)?;
            // By system calls, it has ended, and the next may take long.
            self.finish_those_of_calls()?;
        }
        let _ = self.plan.queues[number].kick_event().write(1); // Full means pending.
        Ok(())
    }

    /// Does what is next for a request: another operation, or its answer.
    fn go_on(&mut self, slot: u16) -> Result<(), QueueError> {
        let Self { plan, engine, window, tasks, free, answered, broken, .. } = self;
        let place = &mut tasks[usize::from(slot)];
        let (Some(task), Some(engine)) = (place.as_ref(), engine.as_mut()) else { return Ok(()) };
        let status = match task.progress.step() {
            Step::Done(status) => status,
            step => {
                let write = matches!(step, Step::Transfer { write: true, .. });
                let Durability { writeback, flushes } = &plan.durability;
                let durable = !*flushes || !writeback.load(Ordering::Relaxed);
                let memory = (task.request.data(write), &plan.ram);
                engine.begin(slot, step, memory, (durable, task.progress.waits()));
                return Ok(());
            }
        };
        let Some(task) = place.take() else { return Ok(()) };
        window.leave(task.bytes);
        free.push(slot);
        if *broken {
            return Ok(());
        }
        let written = task.request.answer(&plan.ram, status)?;
        plan.queues[task.queue].complete(task.head, written)?;
        answered[task.queue] = true;
        Ok(())
    }

    /// Takes note of an operation's end.
    fn end(&mut self, mut ended: Ended) -> Result<(), QueueError> {
        let Some(task) = &mut self.tasks[usize::from(ended.slot)] else { return Ok(()) };
        if let Step::Transfer { write: false, span, .. } = task.progress.step() {
            let copied = ended.hand_over(task.request.data(false), &self.plan.ram, span.offset);
            if copied.is_err() {
                ended.result = Err(libc::EFAULT);
            }
        }
        let step = task.progress.completed(ended.given, ended.result);
        if let (Err(errno), Step::Done(Status::IoError)) = (ended.result, step) {
            let error = std::io::Error::from_raw_os_error(errno);
            tracing::warn!(%error, "a request to the disk failed");
        }
        self.go_on(ended.slot)
    }

    /// Takes note of all that has ended.
    fn finish(&mut self) -> Result<(), QueueError> {
        let mut result = Ok(());
        while let Some(ended) = self.engine.as_mut().and_then(Engine::ended) {
            // What follows has ended too, whatever became of this one's queue.
            result = result.and(self.end(ended));
        }
        result
    }

    fn finish_those_of_calls(&mut self) -> Result<(), QueueError> {
        match self.engine.as_ref().and_then(Engine::event) {
            Some(_) => Ok(()),
            None => self.finish().and_then(|()| self.tell()),
        }
    }

    /// Interrupts the driver for queues that have answers, as it asked for.
    fn tell(&mut self) -> Result<(), QueueError> {
        for (queue, answered) in self.plan.queues.iter_mut().zip(&mut self.answered) {
            if std::mem::take(answered) {
                queue.notify()?;
            }
        }
        Ok(())
    }

    /// Gives the host what was begun.
    fn submit(&mut self) {
        let taken = self.engine.as_mut().is_none_or(Engine::submit);
        if !taken && let Some(queue) = self.plan.queues.first() {
            let _ = queue.kick_event().write(1); // Full means pending.
        }
    }

    fn serve(&mut self, kicked: Option<usize>) -> Result<(), QueueError> {
        self.finish()?;
        for number in 0..self.plan.queues.len() {
            if Some(number) == kicked || self.waiting[number] {
                self.take(number)?;
            }
        }
        self.submit();
        // Much has ended already.
        self.finish()?;
        self.submit();
        if self.window.is_empty()
            && let Some(number) = self.waiting.iter().position(|waits| *waits)
        {
            // No end of anything will wake this.
            let _ = self.plan.queues[number].kick_event().write(1);
        }
        self.tell()
    }

    /// Lets all that is in flight end, and answers it.
    fn drain(&mut self) {
        while !self.window.is_empty() {
            self.submit();
            if let Some(engine) = &mut self.engine {
                engine.wait();
            }
            if let Err(error) = self.finish() {
                self.fail(&error);
            }
        }
        let told = self.tell();
        if let (Err(error), false) = (told, self.broken) {
            self.fail(&error);
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.drain();
        // As the device is after a reset.
        self.plan.durability.writeback.store(true, Ordering::Relaxed);
        *self.plan.parked.lock().unwrap_or_else(PoisonError::into_inner) = self.engine.take();
    }
}

impl MutEventSubscriber for Server {
    fn init(&mut self, ops: &mut EventOps) {
        let queues = self.plan.queues.iter().enumerate();
        let mut events: Vec<Events> = queues
            .map(|(number, queue)| {
                Events::with_data(queue.kick_event(), number as u32, EventSet::IN)
            })
            .collect();
        let engine = self.engine.as_ref().and_then(Engine::event);
        events.extend(engine.map(|fd| Events::with_data_raw(fd, ENGINE, EventSet::IN)));
        for event in events {
            if let Err(error) = ops.add(event) {
                tracing::error!(%error, "a disk cannot listen to its events");
                self.fail(&error);
            }
        }
        // The driver may have kicked before the worker listened.
        for queue in &self.plan.queues {
            let _ = queue.kick_event().write(1);
        }
    }

    fn process(&mut self, events: Events, _: &mut EventOps) {
        let kicked = self.plan.queues.get(events.data() as usize);
        kicked.into_iter().for_each(ActiveQueue::acknowledge_kick);
        let kicked = kicked.is_some().then_some(events.data() as usize);
        let result = match self.broken {
            // What is in flight ends, and nobody is told.
            true => self.finish(),
            false => self.serve(kicked),
        };
        if let (Err(error), false) = (result, self.broken) {
            self.fail(&error);
        }
    }
}
