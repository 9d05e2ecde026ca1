//! All of a network device's queues in the hands of this process, from activation to reset.

use std::sync::Arc;

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};

use super::control::Control;
use super::pair::Pair;
use super::taps::Taps;
use super::{CTRL_VQ, DEVICE, MQ};
use crate::memory::GuestRam;
use crate::virtio::{ActivateError, Activation, Fault};

/// What the events of a pair are told apart by, behind its number.
const SOURCES: u32 = 3;
const RECEIVE_KICK: u32 = 0;
const TRANSMIT_KICK: u32 = 1;
const TAP: u32 = 2;
/// Those of the control queue, which is no pair's.
pub(super) const CONTROL: u32 = u32::MAX;

/// See the module.
pub(super) struct NetWorker {
    /// At least one.
    pub(super) pairs: Vec<Pair>,
    pub(super) control: Option<Control>,
    pub(super) taps: Arc<Taps>,
    pub(super) ram: GuestRam,
    pub(super) fault: Fault,
    /// The guest broke a queue.
    broken: bool,
}

impl NetWorker {
    /// A worker for taps that give packets of up to `payload` bytes behind their headers.
    pub(super) fn new(
        taps: &Arc<Taps>,
        payload: usize,
        mut activation: Activation,
    ) -> Result<Self, ActivateError> {
        let (ram, features) = (activation.ram.clone(), activation.features);
        let has = |bit: u64| features & bit != 0;
        // Where the control queue is depends on whether the driver knows of several pairs at all
        // (virtio 1.2, 5.1.2).
        let most = if has(MQ) && has(CTRL_VQ) { taps.queues().len() } else { 1 };
        let control = has(CTRL_VQ).then(|| activation.queues.get_mut(2 * most)?.take()).flatten();
        let mut pairs = Vec::with_capacity(most);
        for number in 0..most {
            let taken = activation
                .take_queue(DEVICE, 2 * number)
                .and_then(|receive| Ok([receive, activation.take_queue(DEVICE, 2 * number + 1)?]));
            match taken {
                Ok(rings) => pairs.push(Pair::new(number, rings, (taps, payload), &ram, features)),
                Err(error) if number == 0 => return Err(error),
                // A driver may leave the last pairs alone, and cannot ask for them then.
                Err(_) => break,
            }
        }
        let control =
            control.map(|queue| Control::new(queue, &ram, if has(MQ) { pairs.len() } else { 0 }));
        let (taps, fault) = (taps.clone(), activation.fault);
        Ok(Self { pairs, control, taps, ram, fault, broken: false })
    }

    /// Whether the guest broke a queue.
    pub(super) fn is_broken(&self) -> bool {
        self.broken
    }

    /// Stops serving what the driver has broken.
    pub(super) fn fail(&mut self, what: &dyn std::fmt::Display) {
        self.fault.report(DEVICE, what);
        self.broken = true;
    }

    /// Answers what the driver asks by the control queue. `set` has so many pairs used, of which it
    /// is given the worker's.
    pub(super) fn serve_control(&mut self, mut set: impl FnMut(&mut Self, usize) -> bool) {
        let Some(mut control) = self.control.take() else { return };
        control.queue.acknowledge_kick();
        let served = match self.broken {
            true => Ok(()),
            false => control.serve(|count| set(self, count)),
        };
        self.control = Some(control);
        if let Err(error) = served {
            self.fail(&error);
        }
    }

    fn set_pairs(&mut self, count: usize) -> bool {
        let changed = self.taps.change(count, || self.taps.set_attached(count));
        if changed {
            for (number, pair) in self.pairs.iter_mut().enumerate() {
                pair.turn(number < count);
            }
        }
        changed
    }

    /// Carries what a pair, or each of them, has to carry.
    fn serve(&mut self, which: Option<usize>, ops: &mut EventOps) {
        let which = which.map_or(0..self.pairs.len(), |number| number..number + 1);
        for (number, pair) in self.pairs.iter_mut().enumerate().take(which.end).skip(which.start) {
            if !self.broken
                && let Err(error) = pair.serve()
            {
                self.fault.report(DEVICE, &error);
                self.broken = true;
            }
            pair.update_watch(self.broken, number as u32 * SOURCES + TAP, ops);
        }
    }
}

impl MutEventSubscriber for NetWorker {
    fn init(&mut self, ops: &mut EventOps) {
        let sources = (0..).step_by(SOURCES as usize).zip(&self.pairs).flat_map(|(first, pair)| {
            let kicks = [&pair.receive, &pair.transmit].map(|ring| ring.kick_event());
            [(kicks[0], first + RECEIVE_KICK), (kicks[1], first + TRANSMIT_KICK)]
        });
        let control = self.control.iter().map(|control| (control.queue.kick_event(), CONTROL));
        let listening = sources.chain(control).try_for_each(|(event, data)| {
            ops.add(Events::with_data(event, data, EventSet::IN))?;
            // The driver may have kicked before the worker listened. A wake-up of either kind
            // serves both rings of a pair.
            if data % SOURCES != TRANSMIT_KICK {
                let _ = event.write(1); // Full means pending.
            }
            Ok::<(), event_manager::Error>(())
        });
        if let Err(error) = listening {
            tracing::error!(%error, "the net device cannot listen to its queues");
            self.fail(&error);
        }
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        if events.data() == CONTROL {
            self.serve_control(Self::set_pairs);
            // Pairs may have come into use, and gone out of it.
            return self.serve(None, ops);
        }
        let (number, source) = ((events.data() / SOURCES) as usize, events.data() % SOURCES);
        let Some(pair) = self.pairs.get_mut(number) else { return };
        match source {
            RECEIVE_KICK => pair.receive.acknowledge_kick(),
            TRANSMIT_KICK => pair.transmit.acknowledge_kick(),
            _ if events.event_set().intersects(EventSet::ERROR | EventSet::HANG_UP) => {
                pair.unplug();
            }
            _ => {}
        }
        self.serve(Some(number), ops);
    }
}

impl Drop for NetWorker {
    /// The next driver begins with one pair.
    fn drop(&mut self) {
        if let Err(error) = self.taps.set_attached(1) {
            tracing::error!(%error, "queues of a tap stay attached that nobody serves");
        }
    }
}
