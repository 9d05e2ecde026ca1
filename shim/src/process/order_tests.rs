//! Steps of one process in all orders in which they can come.
//!
//! Tasks that ask, wait and tell as the shim's do are polled one at a time, and every choice of which goes on is tried. None
//! of it needs a runtime: what they wait for are locks and channels.

use std::{
    cell::{Cell, RefCell},
    pin::Pin,
    rc::Rc,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, Wake, Waker},
};

use tokio::sync::watch;

use super::*;

type Task = Pin<Box<dyn Future<Output = ()>>>;

/// Whether a task was woken since it was polled.
struct Woken(AtomicBool);

impl Wake for Woken {
    fn wake(self: Arc<Self>) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Runs the tasks that `begin` makes in every order, a set of them for each, and calls `end` after each with whether all
/// of them have ended. Returns how many orders there are.
fn in_all_orders<W>(begin: impl Fn() -> (W, Vec<Task>), end: impl Fn(&W, bool)) -> usize {
    // The choices of a run, and of how many each was one.
    let mut choices: Vec<(usize, usize)> = Vec::new();
    for orders in 1.. {
        let (world, tasks) = begin();
        let mut tasks: Vec<_> = tasks
            .into_iter()
            .map(|task| (Some(task), Arc::new(Woken(AtomicBool::new(true)))))
            .collect();
        let mut step = 0;
        loop {
            let ready = |(_, (task, woken)): &(usize, &(Option<Task>, Arc<Woken>))| {
                task.is_some() && woken.0.load(Ordering::Relaxed)
            };
            let ready: Vec<_> =
                tasks.iter().enumerate().filter(ready).map(|(index, _)| index).collect();
            if ready.is_empty() {
                break;
            }
            if step == choices.len() {
                choices.push((0, ready.len()));
            }
            assert_eq!(choices[step].1, ready.len(), "the same choices lead elsewhere");
            let (task, woken) = &mut tasks[ready[choices[step].0]];
            step += 1;
            woken.0.store(false, Ordering::Relaxed);
            let waker = Waker::from(woken.clone());
            if let Some(future) = task
                && future.as_mut().poll(&mut Context::from_waker(&waker)).is_ready()
            {
                *task = None;
            }
        }
        end(&world, tasks.iter().all(|(task, _)| task.is_none()));
        while choices.last().is_some_and(|(choice, of)| choice + 1 == *of) {
            choices.pop();
        }
        match choices.last_mut() {
            Some((choice, _)) => *choice += 1,
            None => return orders,
        }
    }
    unreachable!("there are finitely many")
}

/// Lets the others go on.
async fn others() {
    let mut first = true;
    std::future::poll_fn(|context| {
        if std::mem::take(&mut first) {
            context.waker().wake_by_ref();
            return Poll::Pending;
        }
        Poll::Ready(())
    })
    .await;
}

/// A process, its guest, and what containerd hears.
struct World {
    process: Process,
    started: Cell<bool>,
    paused: Cell<bool>,
    ended: watch::Sender<bool>,
    told: RefCell<Vec<&'static str>>,
}

impl World {
    fn new() -> Rc<Self> {
        let process =
            Process::new(String::new(), Places::default(), Vec::new(), ProcessState::Created);
        Rc::new(Self {
            process,
            started: Cell::new(false),
            paused: Cell::new(false),
            ended: watch::Sender::new(false),
            told: RefCell::default(),
        })
    }

    /// The guest's answer, which takes a while.
    async fn ask(&self, answer: impl FnOnce(&Self) -> bool) -> Result<(), ServiceError> {
        others().await;
        if answer(self) { Ok(()) } else { Err(ServiceError::Precondition("the guest's".into())) }
    }

    async fn tell(&self, event: &'static str) {
        self.told.borrow_mut().push(event);
        others().await;
    }

    fn runs(&self) -> bool {
        self.started.get() && !*self.ended.borrow()
    }

    async fn start(self: Rc<Self>) {
        let asked = self.ask(|guest| !*guest.ended.borrow() && !guest.started.replace(true));
        let _ = self.process.start_by(asked, self.tell("start")).await;
    }

    async fn pause(self: Rc<Self>) {
        let asked = self.ask(|guest| guest.runs() && !guest.paused.replace(true));
        let _ = self.process.pause_by(asked, self.tell("paused")).await;
    }

    async fn resume(self: Rc<Self>) {
        let asked = self.ask(|guest| guest.runs() && guest.paused.replace(false));
        let _ = self.process.resume_by(asked, self.tell("resumed")).await;
    }

    async fn kill(self: Rc<Self>) {
        let _ = self.ask(|guest| !guest.ended.send_replace(true)).await;
    }

    /// As [`crate::pod`] watches each process.
    async fn watch(self: Rc<Self>) {
        let mut ended = self.ended.subscribe();
        let _ = ended.wait_for(|ended| *ended).await;
        self.process.end_by(KILLED, self.tell("reason"), |_| self.tell("exit")).await;
    }

    async fn delete(self: Rc<Self>) {
        let removed = |_, _| async {
            self.tell("delete").await;
            Ok(())
        };
        let _ = self.process.delete_by(removed).await;
    }

    /// As containerd does: when it has heard of the end.
    async fn wait_and_delete(self: Rc<Self>) {
        let exit = self.process.wait().await;
        let told = self.told.borrow().contains(&"exit");
        assert_eq!(told, exit.status == KILLED, "who waits is told after containerd");
        self.delete().await;
    }

    /// What containerd heard, without reasons.
    fn heard(&self) -> Vec<&'static str> {
        let told = self.told.borrow();
        told.iter().copied().filter(|event| *event != "reason").collect()
    }

    fn check_order(&self) {
        let heard = self.heard();
        let at = |event| heard.iter().position(|told| *told == event);
        for event in ["start", "exit", "delete"] {
            let times = heard.iter().filter(|told| **told == event).count();
            assert!(times <= 1, "told twice: {heard:?}");
        }
        let end = at("exit").or(at("delete")).unwrap_or(heard.len());
        for (index, event) in heard.iter().enumerate() {
            let right = match *event {
                "start" => index == 0,
                "paused" => index < end && ["start", "resumed"].contains(&heard[index - 1]),
                "resumed" => index < end && heard[index - 1] == "paused",
                "exit" => at("delete").is_none_or(|delete| index < delete),
                _ => index + 1 == heard.len(),
            };
            assert!(right, "out of order: {heard:?}");
        }
        let reason = self.told.borrow().iter().position(|told| *told == "reason");
        let exit = self.told.borrow().iter().position(|told| *told == "exit");
        assert!(exit.is_none() || reason < exit, "{:?}", self.told.borrow());
    }
}

/// Tries all orders of these steps; all of them have to end, and containerd to hear of them in order.
fn check(steps: &[fn(Rc<World>) -> Task], also: impl Fn(&World)) {
    let begin = || {
        let world = World::new();
        let tasks = steps.iter().map(|step| step(world.clone())).collect();
        (world, tasks)
    };
    let orders = in_all_orders(begin, |world, ended| {
        assert!(ended, "someone waits for ever: {:?}", world.told.borrow());
        world.check_order();
        also(world);
    });
    assert!(orders > 20, "there are only {orders} orders");
}

#[test]
fn process_that_is_started_and_killed_is_told_of_in_order_and_removed() {
    let steps: [fn(Rc<World>) -> Task; 4] = [
        |world| Box::pin(world.start()),
        |world| Box::pin(world.watch()),
        |world| Box::pin(world.kill()),
        |world| Box::pin(world.wait_and_delete()),
    ];
    check(&steps, |world| {
        assert_eq!(world.heard().last(), Some(&"delete"));
        assert_eq!(world.process.state(), ProcessState::Deleted);
    });
}

#[test]
fn pauses_are_told_of_between_start_and_end() {
    let steps: [fn(Rc<World>) -> Task; 4] = [
        |world| {
            Box::pin(async {
                world.clone().start().await;
                world.clone().pause().await;
                world.resume().await;
            })
        },
        |world| Box::pin(world.watch()),
        |world| Box::pin(world.kill()),
        |world| Box::pin(world.pause()),
    ];
    check(&steps, |world| assert!(matches!(world.process.state(), ProcessState::Stopped(_))));
}

#[test]
fn deletions_that_come_early_and_twice_are_refused_until_the_end() {
    let steps: [fn(Rc<World>) -> Task; 4] = [
        |world| {
            Box::pin(async {
                world.clone().start().await;
                world.kill().await;
            })
        },
        |world| Box::pin(world.watch()),
        |world| Box::pin(world.delete()),
        |world| Box::pin(world.delete()),
    ];
    check(&steps, |world| {
        let heard = world.heard();
        let ended = heard.contains(&"exit");
        assert!(ended || !heard.contains(&"delete"), "{heard:?}");
    });
}

#[test]
fn orders_that_go_wrong_are_found() {
    // What telling without a step's lock would do.
    let begin = || {
        let world = World::new();
        let (first, second) = (world.clone(), world.clone());
        let tasks: Vec<Task> = vec![
            Box::pin(async move {
                others().await;
                first.tell("start").await;
            }),
            Box::pin(async move { second.tell("exit").await }),
        ];
        (world, tasks)
    };
    let wrong = Cell::new(0);
    let orders = in_all_orders(begin, |world, ended| {
        assert!(ended);
        wrong.set(wrong.get() + usize::from(world.heard() != ["start", "exit"]));
    });
    assert!(orders > 2 && wrong.get() > 0 && wrong.get() < orders, "{wrong:?} of {orders}");
}
