//! A way to a node that a test can close and cut.
//!
//! ```text
//! client ─► Gate ─► node      closed: connections stay or are taken, and nothing passes
//!                             cut: those that there are end
//!                             clogged: small things pass, and of large ones only the beginning
//! ```

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use parking_lot::Mutex;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream, tcp},
    sync::watch,
    task::JoinSet,
};

/// Bytes passed at once.
const CHUNK: usize = 64 << 10;

/// What passes a clogged gate on each connection: questions, and no block.
const NARROW: usize = 32 << 10;

/// The way to one node.
pub struct Gate {
    address: SocketAddr,
    is_open: watch::Sender<bool>,
    is_clogged: Arc<AtomicBool>,
    wires: Arc<Mutex<JoinSet<()>>>,
    _door: JoinSet<()>,
}

impl Gate {
    /// An open gate before a node.
    ///
    /// # Panics
    /// When nothing can be listened on.
    pub async fn before(node: SocketAddr) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let address = listener.local_addr().expect("its address");
        let (is_open, opened) = watch::channel(true);
        let is_clogged = Arc::new(AtomicBool::new(false));
        let narrow = is_clogged.clone();
        let wires = Arc::<Mutex<JoinSet<()>>>::default();
        let mut door = JoinSet::new();
        let its = wires.clone();
        door.spawn(async move {
            while let Ok((near, _)) = listener.accept().await {
                let (opened, narrow) = (opened.clone(), narrow.clone());
                its.lock().spawn(async move {
                    let Ok(far) = TcpStream::connect(node).await else {
                        return;
                    };
                    let ((near_in, near_out), (far_in, far_out)) =
                        (near.into_split(), far.into_split());
                    tokio::join!(
                        pass(near_in, far_out, opened.clone(), Some(narrow)),
                        pass(far_in, near_out, opened, None)
                    );
                });
            }
        });
        Self {
            address,
            is_open,
            is_clogged,
            wires,
            _door: door,
        }
    }

    /// Where it is, as a member declares it.
    #[must_use]
    pub fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Nothing passes any more.
    pub fn close(&self) {
        self.is_open.send_replace(false);
    }

    /// Everything passes, what has waited first.
    pub fn open(&self) {
        self.is_open.send_replace(true);
    }

    /// Towards the node only the first bytes of each connection pass from now on: it answers what is asked, and takes no
    /// block.
    pub fn clog(&self) {
        self.is_clogged.store(true, Ordering::Relaxed);
    }

    /// All connections end.
    pub fn cut(&self) {
        self.wires.lock().abort_all();
    }
}

async fn pass(
    mut from: tcp::OwnedReadHalf,
    mut to: tcp::OwnedWriteHalf,
    mut opened: watch::Receiver<bool>,
    narrow: Option<Arc<AtomicBool>>,
) {
    let mut bytes = vec![0; CHUNK];
    let mut passed = 0;
    let is_stuck = |passed: &mut usize, count: usize| {
        *passed += count;
        let is_narrow = narrow.as_ref().is_some_and(|n| n.load(Ordering::Relaxed));
        is_narrow && *passed > NARROW
    };
    while let Ok(count) = from.read(&mut bytes).await
        && count > 0
        && opened.wait_for(|is_open| *is_open).await.is_ok()
        && !wait_if(is_stuck(&mut passed, count)).await
        && to.write_all(&bytes[..count]).await.is_ok()
    {}
}

/// For ever, if so.
async fn wait_if(is_stuck: bool) -> bool {
    match is_stuck {
        true => std::future::pending().await,
        false => false,
    }
}
