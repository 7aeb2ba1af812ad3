//! Writing on a lane: frames that wait, then the body, cut into DATA frames as windows and socket take it.
//!
//! ```text
//! mail ─(no frame half sent)─► outbox │ rest of the body's frame │ tail      one writev
//! ```
//!
//! Errors: the socket's.

use std::io::{self, IoSlice};

use super::{Lane, Push, Socket};
use crate::http2::{
    frame::{END_STREAM, Head, Kind},
    outgoing::Outgoing,
};

/// Slices of a body that go into one write at most.
const BODY_SLICES: usize = 16;

impl Lane {
    /// Writes as much as there is, and as socket and windows take.
    ///
    /// # Errors
    /// The socket's.
    pub fn push<S: Socket>(&mut self, socket: &S, body: &mut Outgoing<'_>) -> io::Result<Push> {
        let pushed = self.write(socket, body);
        self.is_mid_frame = !body.is_at_boundary();
        if matches!(pushed, Ok(Push::Done)) {
            self.stream.is_answered = true;
        }
        pushed
    }

    fn write<S: Socket>(&mut self, socket: &S, body: &mut Outgoing<'_>) -> io::Result<Push> {
        loop {
            if self.outbox.is_empty() && body.is_at_boundary() {
                std::mem::swap(&mut self.outbox, &mut self.mail);
            }
            if body.frame_left == 0 && !body.is_framed {
                let starved = self.frame_next(body);
                if starved.is_some() && self.outbox.is_empty() {
                    return Ok(starved.unwrap_or(Push::Hungry));
                }
            }
            if self.outbox.is_empty() && body.is_sent() {
                return Ok(Push::Done);
            }
            let written = {
                let mut slices = [IoSlice::new(&[]); BODY_SLICES + 2];
                slices[0] = IoSlice::new(&self.outbox);
                let (count, bytes) = body.slices(&mut slices[1..=BODY_SLICES]);
                let mut count = 1 + count;
                if body.is_framed && bytes == body.frame_left {
                    slices[count] = IoSlice::new(&body.tail[body.tail_at..]);
                    count += 1;
                }
                match socket.try_write_vectored(&slices[..count]) {
                    Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                    Ok(written) => written,
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                        return Ok(Push::NoRoom);
                    }
                    Err(error) => return Err(error),
                }
            };
            let of_outbox = written.min(self.outbox.len());
            self.outbox.drain(..of_outbox);
            let of_body = (written - of_outbox).min(body.frame_left);
            body.advance(of_body);
            body.tail_at += written - of_outbox - of_body;
        }
    }

    /// Sends what waits in the outbox and nothing else; answers whether all of it went.
    ///
    /// # Errors
    /// The socket's.
    pub fn flush<S: Socket>(&mut self, socket: &S) -> io::Result<bool> {
        Ok(self.push(socket, &mut Outgoing::default())? != Push::NoRoom)
    }

    /// Puts the head of the next DATA frame into the outbox, or says what it lacks.
    fn frame_next(&mut self, body: &mut Outgoing<'_>) -> Option<Push> {
        if body.ready_bytes == 0 {
            if !body.is_closed {
                return Some(Push::Hungry);
            }
            if !body.tail.is_empty() {
                body.is_framed = true;
                return None;
            }
        }
        let window = self.stream.window_bytes.min(self.connection_window_bytes);
        let room = usize::try_from(window).unwrap_or(0);
        let length = body.ready_bytes.min(self.peer_frame_bytes).min(room);
        if length == 0 && body.ready_bytes > 0 {
            return Some(Push::NoWindow);
        }
        let is_last = body.is_closed && length == body.ready_bytes;
        let ends_stream = is_last && body.tail.is_empty();
        let head = Head {
            length,
            kind: Kind::Data,
            flags: if ends_stream { END_STREAM } else { 0 },
            stream: self.stream.id,
        };
        self.outbox.extend_from_slice(&head.bytes());
        body.frame_left = length;
        body.ready_bytes -= length;
        body.is_framed = is_last;
        self.stream.window_bytes -= length as i64;
        self.connection_window_bytes -= length as i64;
        None
    }
}
