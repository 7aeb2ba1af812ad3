//! HTTP/2 frames as a lane needs them: nine bytes of head, and the few payloads it makes or reads.
//!
//! ```text
//! │ length u24 BE │ type u8 │ flags u8 │ 0 + stream u31 BE │ payload … │
//! ```
//!
//! Units: bytes.
//! Errors: none here; the lane judges what it reads.
//! Source: RFC 9113 sections 4 to 6; RFC 7541 section 6.2.2 for the literal header form.

/// Bytes of a frame's head.
pub const HEAD_BYTES: usize = 9;

/// What a client says first on every connection.
pub const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// Windows before anybody changes them.
pub const DEFAULT_WINDOW_BYTES: i64 = 65_535;

/// Largest window there is.
pub const MAX_WINDOW_BYTES: u32 = (1 << 31) - 1;

/// Frame payload that every peer takes.
pub const DEFAULT_FRAME_BYTES: usize = 16 << 10;

/// Of DATA and HEADERS: nothing follows on this stream.
pub const END_STREAM: u8 = 0x1;
/// Of SETTINGS and PING: an answer.
pub const ACK: u8 = 0x1;
/// Of HEADERS and CONTINUATION: the header block is whole.
pub const END_HEADERS: u8 = 0x4;
/// Of DATA and HEADERS: the payload begins with the length of its padding.
pub const PADDED: u8 = 0x8;
/// Of HEADERS: five bytes of priority come first.
pub const PRIORITY: u8 = 0x20;

/// Whether a server may push; never here.
pub const SETTING_ENABLE_PUSH: u16 = 0x2;

/// Streams the peer may have open at once.
pub const SETTING_MAX_CONCURRENT_STREAMS: u16 = 0x3;

/// Window of each new stream.
pub const SETTING_INITIAL_WINDOW_SIZE: u16 = 0x4;

/// Largest frame payload.
pub const SETTING_MAX_FRAME_SIZE: u16 = 0x5;

/// Terrace's own: 1 says that this client never has more than one stream open, and writes
/// its header blocks as plain literals. Whoever does not know it
/// passes over it, as the RFC asks (section 5.5), and loses nothing.
pub const SETTING_ONE_STREAM: u16 = 0xf7e0;

/// The kinds of frames a lane knows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Bytes of a body.
    Data,
    /// A header block begins.
    Headers,
    /// RST_STREAM: the stream is over.
    Reset,
    /// How the sender wants to be spoken to.
    Settings,
    /// Never allowed here.
    PushPromise,
    /// To be answered with its own payload.
    Ping,
    /// No new streams.
    GoAway,
    /// More bytes may be sent.
    WindowUpdate,
    /// A header block goes on.
    Continuation,
    /// To be passed over, as the RFC asks.
    Other(u8),
}

impl Kind {
    fn from_byte(byte: u8) -> Self {
        match byte {
            0x0 => Self::Data,
            0x1 => Self::Headers,
            0x3 => Self::Reset,
            0x4 => Self::Settings,
            0x5 => Self::PushPromise,
            0x6 => Self::Ping,
            0x7 => Self::GoAway,
            0x8 => Self::WindowUpdate,
            0x9 => Self::Continuation,
            other => Self::Other(other),
        }
    }

    fn byte(self) -> u8 {
        match self {
            Self::Data => 0x0,
            Self::Headers => 0x1,
            Self::Reset => 0x3,
            Self::Settings => 0x4,
            Self::PushPromise => 0x5,
            Self::Ping => 0x6,
            Self::GoAway => 0x7,
            Self::WindowUpdate => 0x8,
            Self::Continuation => 0x9,
            Self::Other(byte) => byte,
        }
    }
}

/// The head of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Head {
    /// Bytes of payload.
    pub length: usize,
    /// What it is.
    pub kind: Kind,
    /// [`END_STREAM`] and the like; their meaning depends on the kind.
    pub flags: u8,
    /// 0 is the connection itself.
    pub stream: u32,
}

impl Head {
    /// Reads a head; every nine bytes are one.
    pub fn read(bytes: &[u8; HEAD_BYTES]) -> Self {
        Self {
            length: u32::from_be_bytes([0, bytes[0], bytes[1], bytes[2]]) as usize,
            kind: Kind::from_byte(bytes[3]),
            flags: bytes[4],
            stream: u32::from_be_bytes([bytes[5] & 0x7f, bytes[6], bytes[7], bytes[8]]),
        }
    }

    /// The head's bytes; `length` is below 2^24 wherever a lane makes one.
    pub fn bytes(self) -> [u8; HEAD_BYTES] {
        let length = (self.length as u32).to_be_bytes();
        let stream = self.stream.to_be_bytes();
        let kind = self.kind.byte();
        [
            length[1], length[2], length[3], kind, self.flags, stream[0], stream[1], stream[2],
            stream[3],
        ]
    }

    /// Whether any bit of `flag` is set.
    pub fn has(self, flag: u8) -> bool {
        self.flags & flag != 0
    }
}

/// Appends a whole frame.
pub fn put_frame(out: &mut Vec<u8>, kind: Kind, flags: u8, stream: u32, payload: &[u8]) {
    let head = Head {
        length: payload.len(),
        kind,
        flags,
        stream,
    };
    out.extend_from_slice(&head.bytes());
    out.extend_from_slice(payload);
}

/// Appends a WINDOW_UPDATE.
pub fn put_window_update(out: &mut Vec<u8>, stream: u32, more_bytes: u32) {
    put_frame(
        out,
        Kind::WindowUpdate,
        0,
        stream,
        &more_bytes.to_be_bytes(),
    );
}

/// Appends a header field as a literal that no table remembers: a lane keeps no state for its requests,
/// and a few dozen bytes more are nothing beside a block.
pub fn put_field(out: &mut Vec<u8>, name: &[u8], value: &[u8]) {
    out.push(0);
    put_string(out, name);
    put_string(out, value);
}

fn put_string(out: &mut Vec<u8>, text: &[u8]) {
    const PREFIX_MAX: usize = 127;
    if text.len() < PREFIX_MAX {
        out.push(text.len() as u8);
    } else {
        out.push(PREFIX_MAX as u8);
        let mut rest = text.len() - PREFIX_MAX;
        while rest >= 128 {
            out.push((rest % 128) as u8 | 0x80);
            rest /= 128;
        }
        out.push(rest as u8);
    }
    out.extend_from_slice(text);
}

#[cfg(test)]
mod tests {
    use super::{Head, Kind, put_field};

    #[test]
    fn heads_round_trip() {
        for kind in [
            Kind::Data,
            Kind::Headers,
            Kind::Continuation,
            Kind::Other(0xee),
        ] {
            let head = Head {
                length: 0x01_02_03,
                kind,
                flags: 5,
                stream: 0x7fff_fff1,
            };
            assert_eq!(Head::read(&head.bytes()), head);
        }
    }

    #[test]
    fn a_decoder_reads_literal_fields_of_any_length() {
        for length in [0, 1, 126, 127, 128, 254, 255, 400, 20_000] {
            let value = vec![b'v'; length];
            let mut block = Vec::new();
            put_field(&mut block, b"name", &value);
            let fields = loona_hpack::Decoder::new()
                .decode(&block)
                .expect("a header block");
            assert_eq!(fields, vec![(b"name".to_vec(), value)]);
        }
    }
}
