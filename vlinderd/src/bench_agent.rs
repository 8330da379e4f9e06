//! The echo agent of `vlinder bench`: answers what it is told; told `kv-probe N`, it times N kv gets through
//! the bridge and answers with the list of microseconds. A plain HTTP/1.1 server, so that the
//! measure shows the bridge and not the agent.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::process::ExitCode;
use std::time::Instant;

/// Largest body, in bytes.
const BODY_MAX: usize = 1024 * 1024;
/// Warm-up gets before the timed ones.
const WARM_UP: usize = 20;

/// The entry of `vlinderd bench-agent`.
pub fn main() -> ExitCode {
    // The agent's contract hands it its port and its bridge by environment (interfaces.md §5).
    let port: u16 = std::env::var("PORT")
        .ok()
        .and_then(|text| text.parse().ok())
        .unwrap_or(8080);
    let bridge = std::env::var("VLINDER_BRIDGE_URL").unwrap_or_default();
    let listener = match TcpListener::bind(("127.0.0.1", port)) {
        Ok(listener) => listener,
        Err(error) => {
            eprintln!("cannot listen on {port}: {error}");
            return ExitCode::FAILURE;
        }
    };
    for connection in listener.incoming().flatten() {
        let bridge = bridge.clone();
        std::thread::spawn(move || serve(connection, &bridge));
    }
    ExitCode::SUCCESS
}

fn serve(connection: TcpStream, bridge: &str) {
    let _ = connection.set_nodelay(true);
    let Ok(mut writer) = connection.try_clone() else {
        return;
    };
    let mut reader = BufReader::new(connection);
    while let Some((head, body)) = read_message(&mut reader) {
        let invocation = header(&head, "x-vlinder-invocation")
            .unwrap_or_default()
            .to_owned();
        let reply = if head[0].starts_with("GET /health") {
            b"ok".to_vec()
        } else {
            answer(&body, bridge, &invocation)
        };
        let mut response = format!(
            "HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: {}\r\n\r\n",
            reply.len()
        )
        .into_bytes();
        response.extend(reply);
        if writer.write_all(&response).is_err() {
            return;
        }
    }
}

fn answer(body: &[u8], bridge: &str, invocation: &str) -> Vec<u8> {
    let text = String::from_utf8_lossy(body);
    let input = text.lines().last().unwrap_or_default();
    let input = input.strip_prefix("User: ").unwrap_or(input);
    let Some(count) = input
        .strip_prefix("kv-probe ")
        .and_then(|count| count.trim().parse::<usize>().ok())
    else {
        return input.as_bytes().to_vec();
    };
    match probe(bridge, invocation, count.min(20_000)) {
        Ok(micros) => format!("{micros:?}").into_bytes(),
        Err(error) => format!("the bridge cannot be measured: {error}").into_bytes(),
    }
}

/// Times kv gets over one kept-alive connection.
fn probe(bridge: &str, invocation: &str, count: usize) -> std::io::Result<Vec<u64>> {
    let bad = || std::io::Error::other("VLINDER_BRIDGE_URL is not http://host:port/…");
    let rest = bridge.strip_prefix("http://").ok_or_else(bad)?;
    let (host, path) = rest.split_once('/').ok_or_else(bad)?;
    let connection = TcpStream::connect(host)?;
    connection.set_nodelay(true)?;
    let mut writer = connection.try_clone()?;
    let mut reader = BufReader::new(connection);
    let mut micros = Vec::with_capacity(count);
    for index in 0..count + WARM_UP {
        let body = format!("{{\"path\":\"probe/{index}\"}}");
        let request = format!(
            "POST /{path}/sqlite-kv/get HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n\
             X-Vlinder-Invocation: {invocation}\r\nContent-Length: {}\r\n\r\n{body}",
            body.len()
        );
        let began = Instant::now();
        writer.write_all(request.as_bytes())?;
        let (head, reply) =
            read_message(&mut reader).ok_or_else(|| std::io::Error::other("the bridge hung up"))?;
        if !head[0].contains(" 200 ") {
            return Err(std::io::Error::other(format!(
                "{}: {}",
                head[0],
                String::from_utf8_lossy(&reply)
            )));
        }
        if index >= WARM_UP {
            micros.push(began.elapsed().as_micros() as u64);
        }
    }
    Ok(micros)
}

fn header<'a>(head: &'a [String], name: &str) -> Option<&'a str> {
    head.iter().skip(1).find_map(|line| {
        let (key, value) = line.split_once(':')?;
        key.eq_ignore_ascii_case(name).then(|| value.trim())
    })
}

/// Reads the head lines and the body of one message; `None` at the end of the connection.
fn read_message(reader: &mut BufReader<TcpStream>) -> Option<(Vec<String>, Vec<u8>)> {
    let mut head = Vec::new();
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line).ok()? == 0 {
            return None;
        }
        let line = line.trim_end();
        if line.is_empty() {
            break;
        }
        head.push(line.to_owned());
    }
    if head.is_empty() {
        return None;
    }
    let chunked = header(&head, "transfer-encoding")
        .is_some_and(|value| value.eq_ignore_ascii_case("chunked"));
    let body = if chunked {
        read_chunks(reader)?
    } else {
        let len: usize = header(&head, "content-length")
            .and_then(|text| text.parse().ok())
            .unwrap_or(0);
        let mut body = vec![0; len.min(BODY_MAX)];
        reader.read_exact(&mut body).ok()?;
        body
    };
    Some((head, body))
}

fn read_chunks(reader: &mut BufReader<TcpStream>) -> Option<Vec<u8>> {
    let mut body = Vec::new();
    loop {
        let mut line = String::new();
        reader.read_line(&mut line).ok()?;
        let len = usize::from_str_radix(line.trim(), 16).ok()?;
        let mut chunk = vec![0; len.min(BODY_MAX) + 2];
        reader.read_exact(&mut chunk).ok()?;
        if len == 0 {
            return Some(body);
        }
        chunk.truncate(len);
        body.extend(chunk);
        if body.len() > BODY_MAX {
            return None;
        }
    }
}
