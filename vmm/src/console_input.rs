//! Brings what is typed at the console's other end to the guest.

use std::os::fd::RawFd;
use std::sync::{Arc, Mutex};

use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};

use crate::event_loop::{EventLoop, EventLoopError};
use crate::pci::bus::lock;
use crate::ports::Console;

struct ConsoleInput {
    console: Arc<Mutex<Console>>,
    descriptor: RawFd,
}

/// Watches the console's other end on `io`, when it is something that can be watched.
///
/// # Errors
/// The event loop has ended.
pub fn watch(io: &EventLoop, console: &Arc<Mutex<Console>>) -> Result<(), EventLoopError> {
    if let Some(descriptor) = lock(console).input_descriptor() {
        io.add(Box::new(ConsoleInput { console: console.clone(), descriptor }))?;
    }
    Ok(())
}

impl MutEventSubscriber for ConsoleInput {
    fn init(&mut self, ops: &mut EventOps) {
        // A regular file cannot be watched: then nothing is ever typed.
        let _ = ops.add(Events::new_raw(self.descriptor, EventSet::IN));
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        let goes_on = lock(&self.console).take_input();
        if !goes_on || events.event_set().intersects(EventSet::ERROR | EventSet::HANG_UP) {
            let _ = ops.remove(Events::new_raw(self.descriptor, EventSet::IN));
        }
    }
}
