//! Whether a process has taken what was sent to it.

use std::{io, os::fd::AsFd};

/// `SIOCOUTQ`, by its older name's number.
const SIOCOUTQ: rustix::ioctl::Opcode = 0x5411;

/// Memory of what was sent on a connected Unix socket and not yet read at its other end; 0 when all was read.
/// Descriptors that go with those bytes are in flight as long, on the account of the sender's user.
///
/// # Errors
/// What is no socket, or a kernel that does not say.
pub fn unread_bytes(socket: impl AsFd) -> io::Result<usize> {
    // SAFETY: SIOCOUTQ writes one C int and does nothing else, which is what the getter makes room for.
    let unread = unsafe {
        let getter = rustix::ioctl::Getter::<SIOCOUTQ, std::ffi::c_int>::new();
        rustix::ioctl::ioctl(socket, getter)
    }?;
    Ok(usize::try_from(unread).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use std::{
        io::{Read, Write},
        os::unix::net::UnixStream,
    };

    use super::*;

    #[test]
    fn what_was_sent_is_unread_until_its_last_byte_is_taken() {
        let (mut ours, mut theirs) = UnixStream::pair().unwrap();
        assert_eq!(unread_bytes(&ours).unwrap(), 0);
        ours.write_all(&[1, 2]).unwrap();
        let mut byte = [0];
        for _ in 0..2 {
            assert_ne!(unread_bytes(&ours).unwrap(), 0);
            theirs.read_exact(&mut byte).unwrap();
        }
        assert_eq!(unread_bytes(&ours).unwrap(), 0);
    }
}
