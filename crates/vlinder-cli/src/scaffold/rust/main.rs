//! @NAME@: an agent of Vlinder. Rust's standard library only.
//!
//! An agent is an HTTP server: `GET /health` answers 200, `POST /invoke` answers one turn. What it must
//! remember goes through the node, never into a variable: it may be killed and replaced at any time.

use std::env;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::thread;

/// The reply to one turn. Put your agent here.
///
/// `said` is the conversation: lines `User: …` and `Agent: …`, the last one new; in the first turn the
/// bare input. `call("sqlite-kv/get", r#"{"path": "…"}"#)` asks the node; so do sqlite-kv/put, /list and
/// /delete.
fn answer(said: &str, call: impl Fn(&str, &str) -> io::Result<String>) -> io::Result<String> {
    let known = call("sqlite-kv/get", r#"{"path": "count"}"#)?;
    let count = known.parse::<u64>().unwrap_or(0) + 1;
    call("sqlite-kv/put", &format!(r#"{{"path": "count", "content": "{count}"}}"#))?;
    let users: Vec<&str> = said.lines().filter_map(|line| line.strip_prefix("User: ")).collect();
    let (input, before) = match users[..] {
        [] => (said, String::new()),
        [.., before, last] => (last, format!(" Before that you said: {before}")),
        [only] => (only, String::new()),
    };
    Ok(format!("You said: {input} (number {count} in this session).{before}"))
}

/// Asks the node. A process is told where it is; a container finds it by name.
fn ask(invocation: &str, what: &str, body: &str) -> io::Result<String> {
    let (service, call) = what.split_once('/').unwrap_or((what, ""));
    let (host, path) = match env::var("VLINDER_BRIDGE_URL") {
        Ok(bridge) => {
            let bridge = bridge.trim_start_matches("http://").to_owned();
            let (host, secret) = bridge.split_once('/').unwrap_or((&bridge, ""));
            (host.to_owned(), format!("/{secret}/{what}"))
        }
        Err(_) => (format!("{service}.vlinder.local:3544"), format!("/{call}")),
    };
    let mut stream = TcpStream::connect(&host)?;
    let length = body.len();
    write!(
        stream,
        "POST {path} HTTP/1.1\r\nHost: {host}\r\nX-Vlinder-Invocation: {invocation}\r\n\
         Content-Length: {length}\r\nConnection: close\r\n\r\n{body}"
    )?;
    let (first, _, body) = read(&mut BufReader::new(stream))?;
    let body = String::from_utf8_lossy(&body).into_owned();
    match first.split(' ').nth(1) {
        Some("200") => Ok(body),
        _ => Err(io::Error::other(format!("{what} answered {first}: {body}"))),
    }
}

/// Reads one message: its first line, the invocation that it names, its body.
fn read(from: &mut impl BufRead) -> io::Result<(String, String, Vec<u8>)> {
    let (mut first, mut invocation, mut length) = (String::new(), String::new(), 0);
    from.read_line(&mut first)?;
    loop {
        let mut line = String::new();
        if from.read_line(&mut line)? <= 2 {
            break;
        }
        match line.split_once(':') {
            Some((name, value)) if name.eq_ignore_ascii_case("content-length") => {
                length = value.trim().parse().map_err(io::Error::other)?;
            }
            Some((name, value)) if name.eq_ignore_ascii_case("x-vlinder-invocation") => {
                invocation = value.trim().to_owned();
            }
            _ => {}
        }
    }
    let mut body = Vec::new();
    from.take(length).read_to_end(&mut body)?;
    Ok((first.trim_end().to_owned(), invocation, body))
}

fn serve(stream: TcpStream) -> io::Result<()> {
    let mut from = BufReader::new(stream.try_clone()?);
    let (first, invocation, body) = read(&mut from)?;
    let (status, reply) = if first.starts_with("GET /health ") {
        (200, "ok".to_owned())
    } else if first.starts_with("POST /invoke ") {
        let said = String::from_utf8_lossy(&body);
        // Any other status than 200 fails the turn, with this text on record.
        match answer(&said, |what, body| ask(&invocation, what, body)) {
            Ok(reply) => (200, reply),
            Err(error) => (500, error.to_string()),
        }
    } else {
        (404, "not here".to_owned())
    };
    let length = reply.len();
    write!(
        &stream,
        "HTTP/1.1 {status} _\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Length: {length}\r\n\
         Connection: close\r\n\r\n{reply}"
    )
}

fn main() -> io::Result<()> {
    // In a container the node comes from outside.
    let host = if env::var("VLINDER_BRIDGE_URL").is_ok() { "127.0.0.1" } else { "0.0.0.0" };
    let port = env::var("PORT").unwrap_or_else(|_| "8080".to_owned());
    for stream in TcpListener::bind(format!("{host}:{port}"))?.incoming() {
        let stream = stream?;
        thread::spawn(move || {
            if let Err(error) = serve(stream) {
                eprintln!("a connection broke: {error}");
            }
        });
    }
    Ok(())
}
