//! `containerd-shim-vial-v2`, which containerd runs for each sandbox.

use std::process::ExitCode;

use vial_shim::{
    runtime::{self, RUNTIME},
    sockets::connector,
};

fn main() -> ExitCode {
    let arguments: Vec<_> = std::env::args_os().skip(1).collect();
    if let [word, user] = &arguments[..]
        && word == connector::WORD
    {
        return connector::run(&user.to_string_lossy());
    }
    let flags = match containerd_shim::parse(&arguments) {
        Ok(flags) if flags.version => {
            println!("containerd-shim-vial-v2 {}", env!("CARGO_PKG_VERSION"));
            return ExitCode::SUCCESS;
        }
        Ok(flags) if !flags.info && flags.action.is_empty() && flags.socket.is_empty() => {
            eprintln!(
                "containerd-shim-vial-v2 is run by containerd, for containers of the runtime \
                 {RUNTIME}; `vial check` tells whether this machine is ready for them"
            );
            return ExitCode::FAILURE;
        }
        Ok(flags) => flags,
        Err(error) => {
            eprintln!("containerd-shim-vial-v2: {error}");
            return ExitCode::FAILURE;
        }
    };
    // One thread: the shim mostly waits, and what a thread costs, every pod on the node pays.
    let threads = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(threads) => threads,
        Err(error) => {
            eprintln!("containerd-shim-vial-v2: cannot start: {error}");
            return ExitCode::FAILURE;
        }
    };
    let done = threads.block_on(runtime::run(flags));
    // Whatever still copies a stream has nobody to copy for.
    threads.shutdown_background();
    match done {
        Ok(()) => ExitCode::SUCCESS,
        // containerd shows what is written here to whoever wanted the container.
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}
