//! Requests whose asker does not wait for the answer.
//!
//! The server drops a request's handler at the deadline that came with the request (`timeout_nano` of ttrpc's `Request`; a
//! kubelet and `crictl` set one, and containerd hands it on). Dropped half-way, a start would leave a process that is
//! starting for ever, which nobody could end or remove. So what changes something runs in a task of its own, to its end.

use tokio::task::{JoinError, JoinHandle};

/// Does `work` to its end, whether or not this future is dropped before.
pub async fn whole<T: Send + 'static>(work: impl Future<Output = T> + Send + 'static) -> T {
    result(tokio::spawn(work).await).await
}

/// As [`whole`], for what only its asker can use: when this future was dropped before, `undo` gets the result.
pub async fn heard<T, U>(
    work: impl Future<Output = T> + Send + 'static,
    undo: impl FnOnce(T) -> U + Send + 'static,
) -> T
where
    T: Send + 'static,
    U: Future<Output = ()> + Send + 'static,
{
    let mut asked = Asked { parts: Some((tokio::spawn(work), undo)) };
    let done = match &mut asked.parts {
        Some((work, _)) => work.await,
        None => return std::future::pending().await,
    };
    asked.parts = None;
    result(done).await
}

/// Work that is under way for someone, and what is to be done when nobody hears of it.
struct Asked<T, F, U>
where
    T: Send + 'static,
    F: FnOnce(T) -> U + Send + 'static,
    U: Future<Output = ()> + Send + 'static,
{
    parts: Option<(JoinHandle<T>, F)>,
}

impl<T, F, U> Drop for Asked<T, F, U>
where
    T: Send + 'static,
    F: FnOnce(T) -> U + Send + 'static,
    U: Future<Output = ()> + Send + 'static,
{
    fn drop(&mut self) {
        if let Some((work, undo)) = self.parts.take() {
            tokio::spawn(async move {
                if let Ok(done) = work.await {
                    undo(done).await;
                }
            });
        }
    }
}

async fn result<T>(done: Result<T, JoinError>) -> T {
    match done {
        Ok(done) => done,
        Err(error) if error.is_panic() => std::panic::resume_unwind(error.into_panic()),
        // The runtime is ending, and everyone who could ask with it.
        Err(_) => std::future::pending().await,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{
        sync::{
            Arc,
            atomic::{AtomicU32, Ordering},
        },
        task::Poll,
    };
    use tokio::sync::Notify;

    /// Polls once, and drops.
    async fn abandon(future: impl Future) {
        let mut future = std::pin::pin!(future);
        std::future::poll_fn(|context| {
            assert!(future.as_mut().poll(context).is_pending(), "it was not under way");
            Poll::Ready(())
        })
        .await;
    }

    #[tokio::test]
    async fn work_goes_on_when_nobody_waits() {
        let (go, done) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
        let (told, doing) = (go.clone(), done.clone());
        abandon(whole(async move {
            told.notified().await;
            doing.notify_one();
        }))
        .await;
        go.notify_one();
        done.notified().await;
    }

    #[tokio::test]
    async fn result_is_undone_when_nobody_hears_of_it_and_only_then() {
        let undone = Arc::new(AtomicU32::new(0));
        let count = undone.clone();
        let heard_of = heard(async { 7 }, move |n| async move {
            count.fetch_add(n, Ordering::Relaxed);
        });
        assert_eq!(heard_of.await, 7);
        tokio::task::yield_now().await;
        assert_eq!(undone.load(Ordering::Relaxed), 0);

        let (go, end) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
        let (told, ended, count) = (go.clone(), end.clone(), undone.clone());
        let work = async move {
            told.notified().await;
            3
        };
        abandon(heard(work, move |n| async move {
            count.fetch_add(n, Ordering::Relaxed);
            ended.notify_one();
        }))
        .await;
        go.notify_one();
        end.notified().await;
        assert_eq!(undone.load(Ordering::Relaxed), 3);
    }

    #[tokio::test]
    async fn result_that_came_but_was_not_taken_is_undone() {
        let end = Arc::new(Notify::new());
        let ended = end.clone();
        let mut asked = Box::pin(heard(async { 1 }, move |_| async move { ended.notify_one() }));
        abandon(asked.as_mut()).await;
        // The work ends while its asker does not look.
        tokio::task::yield_now().await;
        drop(asked);
        end.notified().await;
    }
}
