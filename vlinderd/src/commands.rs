//! The commands that look and print.

use crate::args::DoctorFormat;
use crate::{EXIT_OK, EXIT_OTHER};
use vlinder_config::{Loaded, Mistake};

mod doctor;
mod health;

/// Prints mistakes, one a line, to stderr.
pub fn print_mistakes(mistakes: &[Mistake]) {
    for mistake in mistakes {
        eprintln!("{mistake}");
    }
    let plural = if mistakes.len() == 1 { "" } else { "s" };
    eprintln!(
        "{} mistake{plural} in the configuration; nothing was started",
        mistakes.len()
    );
}

/// Says that the configuration has no mistakes.
pub fn checked(loaded: Loaded) -> u8 {
    for warning in &loaded.warnings {
        eprintln!("warning: {warning}");
    }
    let file = loaded
        .config_file
        .as_ref()
        .map_or("no file, defaults".to_owned(), |file| {
            file.display().to_string()
        });
    println!(
        "the configuration is good ({file}, data in {})",
        loaded.data_dir.display()
    );
    EXIT_OK
}

/// Checks this machine; exit 0 only if nothing needed is missing.
pub fn doctor(loaded: Loaded, format: DoctorFormat) -> u8 {
    let Some(findings) = block_on(doctor::examine(&loaded)) else {
        return EXIT_OTHER;
    };
    doctor::print(&findings, format);
    if findings
        .iter()
        .any(|finding| finding.level == doctor::Level::Problem)
    {
        EXIT_OTHER
    } else {
        EXIT_OK
    }
}

/// Asks the daemon of this data directory how it is.
pub fn health(loaded: Loaded, live: bool) -> u8 {
    block_on(health::ask(&loaded, live)).unwrap_or(EXIT_OTHER)
}

/// `None`, and a line on stderr, where there is no runtime to be had.
fn block_on<T>(work: impl Future<Output = T>) -> Option<T> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build();
    match runtime {
        Ok(runtime) => Some(runtime.block_on(work)),
        Err(error) => {
            eprintln!("cannot start a runtime: {error}");
            None
        }
    }
}
