//! `vhost-user-vfio`: a guest's virtio-net on a passed-through card, zero-copy. See the README.

#![forbid(unsafe_code)]

use std::io::IsTerminal;
use std::process::ExitCode;

use anyhow::{Context, Result};
use backend::signals::Stop;
use backend::{control, process, show};
use config::{AnswerForm, Command, Config, Order};

fn main() -> ExitCode {
    let command = match config::parse(std::env::args_os()) {
        Ok(command) => command,
        Err(error) => {
            error.print();
            return ExitCode::from(error.exit_code());
        }
    };
    let result = match command {
        Command::Run(config) => run(&config),
        Command::PrintCapabilities => {
            // The back-end program conventions of vhost-user, schema vhost-user.json.
            println!("{{\n  \"type\": \"net\",\n  \"features\": []\n}}");
            Ok(())
        }
        Command::Ask { control, order, form } => ask(&control, &order, form),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(config: &Config) -> Result<()> {
    let filter = tracing_subscriber::EnvFilter::try_new(config.log.as_str()).context("bad log level")?;
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_target(false)
        .init();
    let stop = Stop::new().context("cannot make the stop event")?;
    stop.on_signals().context("cannot catch signals")?;
    process::run(config, &stop)
}

fn ask(control: &std::path::Path, order: &Order, form: AnswerForm) -> Result<()> {
    let answer = control::ask(control, order)?;
    match form {
        AnswerForm::Json => println!("{}", serde_json::to_string_pretty(&answer)?),
        AnswerForm::Text => print!(
            "{}",
            show::answer(&answer).context("the answer is not understood")?
        ),
    }
    Ok(())
}
