//! Reading on a lane: payload to its place, everything else through the inbox, one frame after the other.
//!
//! ```text
//! fill ─► room (direct) │ inbox ─step─► head ─► DATA: data │ HEADERS, CONTINUATION: headers │ else: control
//! ```
//!
//! Bounds: [`READS_IN_A_ROW`], [`MAX_OUTBOX_BYTES`]. Errors: the socket's, the receiver's, breaches.

use std::io::{self, IoSliceMut};

use super::{INBOX_BYTES, Lane, Pump, Receiver, Role, Socket, breach};
use crate::http2::{
    frame::{
        ACK, DEFAULT_FRAME_BYTES, END_STREAM, HEAD_BYTES, Head, Kind, MAX_WINDOW_BYTES, PADDED,
        SETTING_INITIAL_WINDOW_SIZE, SETTING_MAX_FRAME_SIZE, put_frame, put_window_update,
    },
    headers::{Whole, literals},
};

/// Received bytes after which a window is filled up again: half of the largest window.
const REFILL_BYTES: u64 = 1 << 30;
/// Bytes of control frames that may wait to be sent.
const MAX_OUTBOX_BYTES: usize = 64 << 10;
/// Reads of one pump before others have a turn.
const READS_IN_A_ROW: usize = 32;
/// Bytes handed to [`Receiver::chunk`] at a time while it looks for payload: a usual message head fits, and
/// little payload comes along with it.
const CHUNK_BYTES: usize = 512;

impl Lane {
    /// Reads what is there and acts on it.
    ///
    /// # Errors
    /// The socket's, the receiver's, [`io::ErrorKind::ConnectionReset`] when the peer broke the stream off, and
    /// breaches of the protocol.
    pub fn pump<S: Socket, R: Receiver>(
        &mut self,
        socket: &S,
        receiver: &mut R,
    ) -> io::Result<Pump> {
        let mut moved = Pump::Starved;
        for _ in 0..READS_IN_A_ROW {
            loop {
                let (stream, has_ended) = (self.stream.id, self.stream.has_ended);
                if !self.step(receiver)? {
                    break;
                }
                moved = Pump::Moved;
                if self.stream.id != stream {
                    return Ok(Pump::Opened);
                }
                if self.stream.has_ended && !has_ended {
                    return Ok(Pump::Ended);
                }
            }
            match self.fill(socket, receiver) {
                Ok(()) => moved = Pump::Moved,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(moved),
                Err(error) => return Err(error),
            }
        }
        Ok(Pump::Busy)
    }

    /// One read: payload straight to its place, anything behind it into the inbox.
    fn fill<S: Socket, R: Receiver>(&mut self, socket: &S, receiver: &mut R) -> io::Result<()> {
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        } else if self.end == self.inbox.len() {
            self.inbox.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        let is_payload = self.start == self.end;
        if let Some(frame) = self
            .frame
            .as_mut()
            .filter(|frame| is_payload && frame.kind == Kind::Data && frame.length > 0)
            .filter(|frame| !frame.has(PADDED))
            && let Some(room) = receiver.room().filter(|room| !room.is_empty())
        {
            let direct = room.len().min(frame.length).min(self.limits.read_bytes);
            // Behind the end of a frame comes a head: it costs no further read.
            let ahead = if direct == frame.length {
                &mut self.inbox[..]
            } else {
                &mut []
            };
            let mut slices = [IoSliceMut::new(&mut room[..direct]), IoSliceMut::new(ahead)];
            let read = alive(socket.try_read_vectored(&mut slices)?)?;
            let landed = read.min(direct);
            self.end = read - landed;
            frame.length -= landed;
            self.received_bytes += landed as u64;
            return receiver.landed(landed);
        }
        let mut slices = [IoSliceMut::new(&mut self.inbox[self.end..])];
        self.end += alive(socket.try_read_vectored(&mut slices)?)?;
        Ok(())
    }

    /// Acts on what the inbox holds; false when it needs more bytes.
    fn step<R: Receiver>(&mut self, receiver: &mut R) -> io::Result<bool> {
        let Some(frame) = self.frame else {
            let Some(head) = self.inbox[self.start..self.end].first_chunk() else {
                return Ok(false);
            };
            let head = Head::read(head);
            self.start += HEAD_BYTES;
            self.judge_head(head)?;
            self.frame = Some(head);
            return Ok(true);
        };
        if frame.kind == Kind::Data {
            return self.data(receiver, frame);
        }
        if self.end - self.start < frame.length {
            return Ok(false);
        }
        let payload = self.start..self.start + frame.length;
        self.start = payload.end;
        self.frame = None;
        if matches!(frame.kind, Kind::Headers | Kind::Continuation) {
            let whole = self.blocks.take(frame, &self.inbox[payload])?;
            if let Some(whole) = whole {
                self.headers(receiver, frame.stream, whole)?;
            }
            return Ok(true);
        }
        if self.mail.len() > MAX_OUTBOX_BYTES {
            return Err(breach("control frames without end"));
        }
        self.control(frame, payload)?;
        Ok(true)
    }

    /// What can be wrong with a frame before its payload is there.
    fn judge_head(&mut self, head: Head) -> io::Result<()> {
        if self.blocks.is_open() && head.kind != Kind::Continuation {
            return Err(breach("a header block was interrupted"));
        }
        if head.kind != Kind::Data {
            let longest = INBOX_BYTES - HEAD_BYTES;
            if head.length > longest {
                let Head { kind, length, .. } = head;
                return Err(breach(format!("{kind:?} frame of {length} bytes")));
            }
            return Ok(());
        }
        if head.stream != self.stream.id || self.stream.has_ended {
            return Err(breach("DATA of another stream"));
        }
        if head.length > self.limits.max_frame_bytes as usize {
            return Err(breach(format!("DATA frame of {} bytes", head.length)));
        }
        // Padding takes from the windows as payload does.
        self.stream.received_bytes += head.length as u64;
        Ok(())
    }

    /// Reads how much of a DATA frame is padding: we never send any, a peer that hides lengths does.
    fn padding(&mut self, mut frame: Head) -> io::Result<bool> {
        let too_long = || breach("DATA shorter than its padding");
        frame.length = frame.length.checked_sub(1).ok_or_else(too_long)?;
        if self.start == self.end {
            return Ok(false);
        }
        let padding_bytes = self.inbox[self.start].into();
        frame.length = frame
            .length
            .checked_sub(padding_bytes)
            .ok_or_else(too_long)?;
        frame.flags &= !PADDED;
        self.start += 1;
        self.received_bytes += 1;
        self.padding_bytes = padding_bytes;
        self.frame = Some(frame);
        Ok(true)
    }

    fn data<R: Receiver>(&mut self, receiver: &mut R, frame: Head) -> io::Result<bool> {
        if frame.has(PADDED) {
            return self.padding(frame);
        }
        let at_hand = frame.length.min(self.end - self.start);
        if at_hand == 0 && frame.length > 0 {
            return Ok(false);
        }
        if frame.length == 0 && self.padding_bytes > 0 {
            let skipped = self.padding_bytes.min(self.end - self.start);
            self.start += skipped;
            self.received_bytes += skipped as u64;
            self.padding_bytes -= skipped;
            if self.padding_bytes > 0 {
                return Ok(false);
            }
        }
        let bytes = &self.inbox[self.start..self.start + at_hand];
        let (taken, outcome) = match receiver.room().filter(|room| !room.is_empty()) {
            _ if at_hand == 0 => (0, Ok(())),
            Some(room) => {
                let landed = at_hand.min(room.len());
                room[..landed].copy_from_slice(&bytes[..landed]);
                (landed, receiver.landed(landed))
            }
            None => {
                let piece = &bytes[..at_hand.min(CHUNK_BYTES)];
                (piece.len(), receiver.chunk(piece))
            }
        };
        self.start += taken;
        self.received_bytes += taken as u64;
        let left = frame.length - taken;
        let is_over = left == 0 && self.padding_bytes == 0;
        self.frame = (!is_over).then_some(Head {
            length: left,
            ..frame
        });
        if is_over {
            self.stream.has_ended = frame.has(END_STREAM);
            if self.stream.received_bytes >= REFILL_BYTES && !self.stream.has_ended {
                let more = self.stream.received_bytes as u32;
                put_window_update(&mut self.mail, self.stream.id, more);
                self.stream.received_bytes = 0;
            }
            if self.received_bytes >= REFILL_BYTES {
                put_window_update(&mut self.mail, 0, self.received_bytes as u32);
                self.received_bytes = 0;
            }
        }
        outcome.map(|()| true)
    }

    fn headers<R: Receiver>(&mut self, receiver: &mut R, id: u32, whole: Whole) -> io::Result<()> {
        if self.role == Role::Server && id != self.stream.id {
            if id.is_multiple_of(2) || id < self.stream.id {
                return Err(breach(format!("stream {id} cannot be opened")));
            }
            if !self.stream.has_ended || !self.stream.is_answered {
                return Err(breach("a second stream on a connection that promised one"));
            }
            self.begin(id);
        } else if id != self.stream.id || self.stream.has_ended {
            return Err(breach("HEADERS of another stream"));
        }
        self.stream.header_bytes += whole.bytes;
        if self.stream.header_bytes > self.limits.max_headers_bytes {
            return Err(breach("header fields without end"));
        }
        self.stream.has_ended = whole.ends_stream;
        match whole.fields {
            Some(fields) => receiver.headers(fields),
            None if receiver.knows(self.blocks.plain())? => Ok(()),
            None => receiver.headers(literals(self.blocks.plain())?),
        }
    }

    fn control(&mut self, frame: Head, payload: std::ops::Range<usize>) -> io::Result<()> {
        let payload = &self.inbox[payload];
        let word = |what: &str| -> io::Result<u32> {
            let bytes: [u8; 4] = payload
                .try_into()
                .map_err(|_| breach(format!("{what} of the wrong length")))?;
            Ok(u32::from_be_bytes(bytes))
        };
        match frame.kind {
            Kind::Settings if frame.has(ACK) => Ok(()),
            Kind::Settings => {
                if !payload.len().is_multiple_of(6) || frame.stream != 0 {
                    return Err(breach("SETTINGS of the wrong length or on a stream"));
                }
                for setting in payload.chunks_exact(6) {
                    let name = u16::from_be_bytes([setting[0], setting[1]]);
                    let value =
                        u32::from_be_bytes([setting[2], setting[3], setting[4], setting[5]]);
                    if name == SETTING_INITIAL_WINDOW_SIZE {
                        if value > MAX_WINDOW_BYTES {
                            return Err(breach("a window over 2^31 - 1"));
                        }
                        let value = i64::from(value);
                        self.stream.window_bytes += value - self.peer_window_bytes;
                        self.peer_window_bytes = value;
                    } else if name == SETTING_MAX_FRAME_SIZE {
                        self.peer_frame_bytes = (value as usize)
                            .max(DEFAULT_FRAME_BYTES)
                            .min(self.limits.send_frame_bytes);
                    }
                }
                put_frame(&mut self.mail, Kind::Settings, ACK, 0, &[]);
                Ok(())
            }
            Kind::WindowUpdate => {
                let more = i64::from(word("WINDOW_UPDATE")? & MAX_WINDOW_BYTES);
                let window = if frame.stream == 0 {
                    &mut self.connection_window_bytes
                } else if frame.stream == self.stream.id {
                    &mut self.stream.window_bytes
                } else {
                    return Ok(()); // of a stream that is over
                };
                *window += more;
                if more == 0 || *window > i64::from(MAX_WINDOW_BYTES) {
                    return Err(breach("a window over 2^31 - 1, or opened by nothing"));
                }
                Ok(())
            }
            Kind::Ping if frame.has(ACK) => Ok(()),
            Kind::Ping => {
                if payload.len() != 8 {
                    return Err(breach("PING of the wrong length"));
                }
                put_frame(&mut self.mail, Kind::Ping, ACK, 0, payload);
                Ok(())
            }
            Kind::GoAway => {
                self.is_leaving = true;
                let last = payload.first_chunk().map(|id| u32::from_be_bytes(*id));
                let is_served = last.is_none_or(|last| last >= self.stream.id);
                if self.role == Role::Client && !self.stream.has_ended && !is_served {
                    let problem = "the peer leaves without having taken the call";
                    return Err(io::Error::new(io::ErrorKind::ConnectionReset, problem));
                }
                Ok(())
            }
            Kind::Reset if frame.stream == self.stream.id => Err(io::Error::new(
                io::ErrorKind::ConnectionReset,
                "the peer reset the call",
            )),
            Kind::PushPromise => Err(breach("PUSH_PROMISE, which was switched off")),
            _ => Ok(()),
        }
    }
}

/// Zero bytes read mean that the peer has closed.
fn alive(read: usize) -> io::Result<usize> {
    if read == 0 {
        Err(io::ErrorKind::UnexpectedEof.into())
    } else {
        Ok(read)
    }
}
