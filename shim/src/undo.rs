//! What has to be undone, in reverse order of its doing.
//!
//! A chain of steps pushes the undo of each step right after the step succeeded. When a later
//! step fails, [`UndoStack::run`] takes everything back. When the chain succeeds, its owner keeps
//! the stack, and stopping is to run it: there is one way down, whether the start came to its end
//! or not.

use std::{future::Future, pin::Pin};

type Undo = Box<dyn FnOnce() -> Pin<Box<dyn Future<Output = Result<(), String>> + Send>> + Send>;

/// Steps that were done and how to take each back.
#[derive(Default)]
pub struct UndoStack {
    steps: Vec<(&'static str, Undo)>,
}

impl UndoStack {
    /// Remembers how to take back the step `name`, which has just succeeded.
    pub fn push<F, Fut>(&mut self, name: &'static str, undo: F)
    where
        F: FnOnce() -> Fut + Send + 'static,
        Fut: Future<Output = Result<(), String>> + Send + 'static,
    {
        self.steps.push((name, Box::new(move || Box::pin(undo()))));
    }

    /// Takes back every step, the last one first. A step that cannot be taken back is logged and
    /// does not keep the others from theirs; all such failures are returned.
    pub async fn run(mut self) -> Vec<String> {
        let mut failures = Vec::new();
        while let Some((name, undo)) = self.steps.pop() {
            if let Err(error) = undo().await {
                tracing::error!("cannot undo '{name}': {error}");
                failures.push(format!("{name}: {error}"));
            }
        }
        failures
    }
}

impl std::fmt::Debug for UndoStack {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.steps.iter().map(|(name, _)| name)).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::{Arc, Mutex};

    #[tokio::test]
    async fn undo_runs_backwards_and_past_a_failure() {
        let order = Arc::new(Mutex::new(Vec::new()));
        let mut stack = UndoStack::default();
        for (name, result) in
            [("first", Ok(())), ("second", Err("no".to_string())), ("third", Ok(()))]
        {
            let order = order.clone();
            stack.push(name, move || async move {
                order.lock().unwrap().push(name);
                result
            });
        }
        assert_eq!(stack.run().await, ["second: no"]);
        assert_eq!(*order.lock().unwrap(), ["third", "second", "first"]);
    }
}
