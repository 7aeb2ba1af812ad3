//! A lane's socket, TCP or Unix: it never blocks, and is not asked for what it is known to lack.

use std::io::{self, IoSlice, IoSliceMut};

use kvproto::http2::Socket;
use tokio::{
    io::Interest,
    net::{TcpStream, UnixStream},
};

/// The two kinds of sockets.
pub(crate) trait LaneSocket: Send + Sync {
    fn try_readv(&self, slices: &mut [IoSliceMut<'_>]) -> io::Result<usize>;
    fn try_writev(&self, slices: &[IoSlice<'_>]) -> io::Result<usize>;
    fn wait(&self, interest: Interest) -> impl Future<Output = io::Result<()>> + Send;
}

macro_rules! lane_socket {
    ($($stream:ty),*) => {$(
        impl LaneSocket for $stream {
            fn try_readv(&self, slices: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
                let room: usize = slices.iter().map(|slice| slice.len()).sum();
                let mut read = Err(io::ErrorKind::WouldBlock.into());
                let _ = self.try_io(Interest::READABLE, || {
                    read = rustix::io::readv(self, slices).map_err(io::Error::from);
                    match &read {
                        // Less than there is room for: the socket is empty now. Saying so here, where no news can come in
                        // between, spares the read that would find it out.
                        Ok(bytes) if (1..room).contains(bytes) => {
                            Err(io::ErrorKind::WouldBlock.into())
                        }
                        Ok(_) => Ok(()),
                        Err(error) => Err(error.kind().into()),
                    }
                });
                read
            }

            fn try_writev(&self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
                self.try_write_vectored(slices)
            }

            async fn wait(&self, interest: Interest) -> io::Result<()> {
                self.ready(interest).await.map(drop)
            }
        }
    )*};
}

lane_socket!(TcpStream, UnixStream);

pub(super) struct Io<S>(pub(super) S);

impl<S: LaneSocket> Socket for Io<S> {
    fn try_read_vectored(&self, slices: &mut [IoSliceMut<'_>]) -> io::Result<usize> {
        self.0.try_readv(slices)
    }

    fn try_write_vectored(&self, slices: &[IoSlice<'_>]) -> io::Result<usize> {
        self.0.try_writev(slices)
    }
}
