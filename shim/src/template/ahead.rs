//! Has a template made for the pods to come, by another process, when a pod found none.
//!
//! The pod does not wait for it. It goes on when the pod and its shim have ended, has the lowest
//! priority, and there is never more than one on a node ([`create_missing`]).

use std::{
    env,
    fs::{self, File},
    io::Write,
    os::unix::{fs::OpenOptionsExt, process::CommandExt},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, SystemTime},
};

use super::{
    Template,
    create::{self, CreateError},
    remove,
};
use crate::config::{Config, Templates};

/// Where it is written why none could be made.
const FAILED: &str = ".failed";
/// How long nobody tries again by itself after that.
const REST: Duration = Duration::from_secs(600);
/// The most that is read of a reason, in bytes.
const MAX_REASON_BYTES: usize = 4096;
/// How much longer a boot may take that has the lowest priority.
const PATIENCE: u32 = 10;
/// The lowest priority, see setpriority(2).
const NICE: i32 = 19;

/// Starts the making of a template, if the operator wants that.
pub fn begin(config: &Config) {
    if config.templates != Templates::Auto {
        return;
    }
    if let Some(reason) = last_failure(&config.template_directory) {
        tracing::warn!(
            "no template is made now: it failed within the last {} minutes: {reason}; `vial \
             template create` tries at once",
            REST.as_secs() / 60
        );
        return;
    }
    let program = program();
    let mut command = Command::new(&program);
    // Of the shim it has nothing: not its log, which ends with the pod, nor its process group.
    command.args(["template", "create", "--if-missing"]).process_group(0);
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    match command.spawn() {
        Ok(mut making) => {
            tracing::info!("a template is made for the pods to come, by process {}", making.id());
            // Nobody else waits for it as long as the shim lives.
            tokio::task::spawn_blocking(move || {
                if let Err(error) = making.wait() {
                    tracing::warn!("cannot wait for the making of a template: {error}");
                }
            });
        }
        Err(error) => tracing::warn!(
            "cannot have a template made by {}: {error}; install it there, or set `templates = \
             \"manual\"`",
            program.display()
        ),
    }
}

/// `vial` beside the running program, else by the PATH.
fn program() -> PathBuf {
    let own = env::current_exe().ok();
    own.and_then(|own| Some(own.parent()?.join("vial")))
        .filter(|beside| beside.is_file())
        .unwrap_or_else(|| "vial".into())
}

/// Makes the template of the configuration, unless there is one or somebody else makes one.
/// Returns its name when it was made. A failure is written down, and keeps others from trying for
/// ten minutes.
///
/// # Errors
/// [`CreateError`]. Nothing but the reason is left then.
pub async fn create_missing(config: &Config) -> Result<Option<String>, CreateError> {
    // On a host that refuses this, it costs others more time, and no more.
    let _ = rustix::process::setpriority_process(None, NICE);
    let patient = Config { boot_timeout: config.boot_timeout * PATIENCE, ..config.clone() };
    let result = create::create_missing(&patient).await;
    if let Err(error) = &result {
        note_failure(&config.template_directory, &error.to_string());
    }
    result
}

fn note_failure(root: &Path, reason: &str) {
    // Best effort: where nothing can be written there is no template either, and its absence is
    // told by each pod.
    let _ = fs::remove_file(root.join(FAILED));
    let mut options = File::options();
    let file = options.write(true).create_new(true).mode(0o600).open(root.join(FAILED));
    let _ = file.and_then(|mut file| file.write_all(reason.as_bytes()));
}

/// Forgets why none could be made.
pub(super) fn forget_failure(root: &Path) {
    let _ = fs::remove_file(root.join(FAILED)); // Mostly there is none.
}

/// Why no template could be made a short time ago.
pub fn last_failure(root: &Path) -> Option<String> {
    let path = root.join(FAILED);
    let changed = fs::symlink_metadata(&path).and_then(|metadata| metadata.modified()).ok()?;
    // One of the future is none of this clock.
    let age = SystemTime::now().duration_since(changed).ok()?;
    if age > REST {
        return None;
    }
    let text = fs::read(&path).ok()?;
    let text = &text[..text.len().min(MAX_REASON_BYTES)];
    Some(String::from_utf8_lossy(text).trim().to_owned())
}

/// Takes a template out of use that the VMM has refused, so that another is made, unless there is
/// another already.
pub fn discard(config: &Config, template: &Template) {
    if config.templates != Templates::Auto || !template.is_in_place(&config.template_directory) {
        return;
    }
    if let Err(error) = remove(&config.template_directory, &template.name) {
        tracing::warn!("cannot remove the template {}: {error}", template.name);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failure_is_told_for_a_while_and_forgotten() {
        let root = tempfile::tempdir().unwrap();
        assert_eq!(last_failure(root.path()), None);
        note_failure(root.path(), "one");
        note_failure(root.path(), "no space left");
        assert_eq!(last_failure(root.path()).as_deref(), Some("no space left"));
        let long_ago = SystemTime::now() - REST - Duration::from_secs(1);
        let file = File::options().write(true).open(root.path().join(FAILED)).unwrap();
        file.set_modified(long_ago).unwrap();
        assert_eq!(last_failure(root.path()), None);
        note_failure(root.path(), "again");
        forget_failure(root.path());
        assert_eq!(last_failure(root.path()), None);
    }
}
