//! A wire between a client and a server, with scissors.

use std::net::SocketAddr;
use std::time::Duration;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::JoinHandle;

/// What happens to bytes on their way.
#[derive(Clone, Copy, Debug, Default)]
struct Weather {
    /// Bytes from the server are read and lost.
    lose_answers: bool,
    /// Bytes from the server wait.
    hold_answers: bool,
    /// New connections are closed at once.
    refuse: bool,
    /// Every piece waits so long, in both directions.
    delay: Duration,
    /// Connections older than this number are cut.
    cuts: u64,
}

/// Forwards connections to a server and can lose, hold back, delay, refuse and cut.
pub struct TcpProxy {
    address: SocketAddr,
    weather: watch::Sender<Weather>,
    accepting: JoinHandle<()>,
}

impl TcpProxy {
    /// Listens on a port of loopback and forwards to `127.0.0.1:target`.
    pub async fn start(target: u16) -> Self {
        let listener = TcpListener::bind(("127.0.0.1", 0))
            .await
            .expect("loopback has a free port");
        let address = listener.local_addr().expect("it is bound");
        let (weather, seen) = watch::channel(Weather::default());
        let accepting = tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                tokio::spawn(forward(client, target, seen.clone()));
            }
        });
        Self {
            address,
            weather,
            accepting,
        }
    }

    /// Its port.
    pub fn port(&self) -> u16 {
        self.address.port()
    }

    /// `nats://127.0.0.1:<port>`.
    pub fn url(&self) -> String {
        format!("nats://{}", self.address)
    }

    /// While set, what the server says is lost. A stream that lost bytes is broken: [`Self::cut`] it after.
    pub fn lose_answers(&self, lose: bool) {
        self.weather
            .send_modify(|weather| weather.lose_answers = lose);
    }

    /// While set, what the server says waits here.
    pub fn hold_answers(&self, hold: bool) {
        self.weather
            .send_modify(|weather| weather.hold_answers = hold);
    }

    /// While set, new connections are closed at once.
    pub fn refuse(&self, refuse: bool) {
        self.weather.send_modify(|weather| weather.refuse = refuse);
    }

    /// Delays every piece in both directions.
    pub fn delay(&self, delay: Duration) {
        self.weather.send_modify(|weather| weather.delay = delay);
    }

    /// Cuts every present connection.
    pub fn cut(&self) {
        self.weather.send_modify(|weather| weather.cuts += 1);
    }
}

impl Drop for TcpProxy {
    fn drop(&mut self) {
        self.accepting.abort();
        self.cut();
    }
}

async fn forward(client: TcpStream, target: u16, weather: watch::Receiver<Weather>) {
    let born = *weather.borrow();
    if born.refuse {
        return;
    }
    let Ok(server) = TcpStream::connect(("127.0.0.1", target)).await else {
        return;
    };
    // Forwarding byte by byte what was sent at once would measure Nagle's algorithm.
    let _ = (client.set_nodelay(true), server.set_nodelay(true));
    let (from_client, to_client) = client.into_split();
    let (from_server, to_server) = server.into_split();
    let mut until = weather.clone();
    tokio::select! {
        () = pump(from_client, to_server, weather.clone(), false) => {}
        () = pump(from_server, to_client, weather.clone(), true) => {}
        _ = until.wait_for(|weather| weather.cuts != born.cuts) => {}
    }
}

async fn pump(
    mut from: tokio::net::tcp::OwnedReadHalf,
    mut to: tokio::net::tcp::OwnedWriteHalf,
    mut weather: watch::Receiver<Weather>,
    answers: bool,
) {
    let mut buffer = vec![0; 64 * 1024];
    loop {
        let Ok(count @ 1..) = from.read(&mut buffer).await else {
            return;
        };
        let now = *weather.borrow_and_update();
        if !now.delay.is_zero() {
            tokio::time::sleep(now.delay).await;
        }
        if answers {
            if now.lose_answers {
                continue;
            }
            let free = weather.wait_for(|weather| !weather.hold_answers);
            if free.await.is_err() {
                return;
            }
        }
        if to.write_all(&buffer[..count]).await.is_err() {
            return;
        }
    }
}
