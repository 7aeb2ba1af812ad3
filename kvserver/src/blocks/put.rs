//! Put: blocks in, one at a time, each answered for what it became.
//!
//! ```text
//! header ──reserve──► granted: data lands in the slot, is summed ──(sums)──seal──► published ──► ack
//!                     present: data is skipped                           └─ corrupt
//!                     rejected: data is skipped
//!
//! ack cached   answered as soon as it is in RAM
//! ack stored   … once the NVMe tier has said so      refused there: rejected with its reason, although
//! ack synced   … once the durable tier has said so   the block stays in RAM while there is room
//! ```
//!
//! Where runs have several owners, what is new here goes on to the next one (`motion/replicas.rs`); an ack beyond `cached`
//! waits for that too, and says why when it did not get there.
//!
//! Nothing is answered as more than it is. A writer who asked for `stored` and is told `rejected`
//! puts again after `retry_after_ms`; the block is then present in RAM, and only its write is tried again.
//! Errors: [`BlocksError`] when the request breaks the rules; blocks that were whole before stay.
//! Bounds: one slot per session; waiting writes are bounded by the mover's queue.

mod answer;

use std::sync::Arc;

use kvproto::{
    Ack, Announced, BlockHeader, BlockKey, FieldError, Kind, NamespaceId, Place, Reason,
    checksum::Landing,
    convert::{answer::PutResult, block_sums},
    v1,
};
use tokio::sync::oneshot;

use self::answer::Answer;
use super::{
    Blocks, BlocksError,
    motion::{Passed, Passing},
    namespaces::Known,
};
use crate::engine::{Grant, InvalidationId, Reserve, TenantId};

/// One put of any number of blocks.
pub struct PutSession {
    blocks: Arc<Blocks>,
    namespace: NamespaceId,
    known: Known,
    ack: Ack,
    kind: Kind,
    answers: Vec<Answer>,
    filling: Option<Filling>,
    /// What goes on to the next owner; `None`: nothing does.
    passing: Option<Passing>,
    passed: Vec<oneshot::Receiver<Passed>>,
    /// A node hands over what it holds, whoever owns it.
    is_handed_over: bool,
    /// Of a node's: the invalidations that its blocks have survived.
    survived: Option<Vec<InvalidationId>>,
}

/// The block whose data is coming in.
struct Filling {
    /// Counted from 0 in this put.
    number: usize,
    length_bytes: u64,
    received_bytes: u64,
    /// What the writer says of the block; without it, the sums come behind the data.
    header: Option<BlockHeader>,
    announced: Announced,
    into: Into,
}

impl Filling {
    /// All of its bytes are here, and what they should sum up to is known.
    fn is_whole(&self) -> bool {
        self.received_bytes == self.length_bytes && self.header.is_some()
    }
}

enum Into {
    Slot { grant: Box<Grant>, landing: Landing },
    Nowhere,
}

impl Blocks {
    /// Begins a put.
    ///
    /// # Errors
    /// An unknown namespace.
    pub fn put(
        self: &Arc<Self>,
        tenant: TenantId,
        namespace: NamespaceId,
        ack: Ack,
        kind: Kind,
    ) -> Result<PutSession, BlocksError> {
        let known = self.namespaces.get(tenant, namespace)?;
        Ok(PutSession {
            blocks: Arc::clone(self),
            namespace,
            known,
            ack,
            kind,
            answers: Vec::new(),
            filling: None,
            passing: None,
            passed: Vec::new(),
            is_handed_over: false,
            survived: None,
        })
    }

    /// Puts one block from memory; the in-process way.
    ///
    /// # Errors
    /// An unknown namespace, or an empty or too large block.
    pub async fn put_bytes(
        self: &Arc<Self>,
        tenant: TenantId,
        key: BlockKey,
        place: Place,
        bytes: &[u8],
        ack: Ack,
        kind: Kind,
    ) -> Result<PutResult, BlocksError> {
        let mut session = self.put(tenant, key.namespace, ack, kind)?;
        session.block(BlockHeader::describe(key, place, bytes))?;
        session.data(bytes)?;
        let results = session.finish().await?;
        Ok(results[0])
    }
}

impl PutSession {
    /// What is new here goes on to the next owner of its run, where there is one.
    pub fn passes_on(&mut self) {
        if self.known.replicas > 1 && self.blocks.motion().is_some() {
            self.passing = Some(Passing::default());
        }
    }

    /// A node hands over what it holds: a move, or a copy of what many read.
    pub fn is_handed_over(&mut self) {
        self.is_handed_over = true;
    }

    /// The blocks come from a node, where they have survived these invalidations: what others cover is refused.
    pub fn has_survived(&mut self, invalidations: Vec<InvalidationId>) {
        self.survived = Some(invalidations);
    }

    /// Run length of the namespace.
    #[must_use]
    pub fn run_blocks(&self) -> u32 {
        self.known.run_blocks
    }

    /// The next block begins.
    ///
    /// # Errors
    /// When the one before is not whole, there are too many, or its length is out of bounds.
    pub fn block(&mut self, header: BlockHeader) -> Result<(), BlocksError> {
        self.begin(Announced::from(&header), Some(header))
    }

    /// The next block begins; its sums follow its data, see [`PutSession::sums`].
    ///
    /// # Errors
    /// As [`PutSession::block`].
    pub fn announce(&mut self, block: Announced) -> Result<(), BlocksError> {
        self.begin(block, None)
    }

    fn begin(
        &mut self,
        announced: Announced,
        header: Option<BlockHeader>,
    ) -> Result<(), BlocksError> {
        self.check_whole()?;
        let limits = &self.blocks.limits;
        if self.answers.len() >= limits.max_blocks_per_call {
            let most = limits.max_blocks_per_call;
            let problem = format!(
                "is one too many: {most} blocks are allowed in one put (max_blocks_per_call)"
            );
            return Err(FieldError::new("header", problem).into());
        }
        let Announced {
            key,
            place,
            length_bytes,
        } = announced;
        if length_bytes == 0 || length_bytes > limits.max_block_bytes {
            let problem = format!(
                "is {length_bytes}; 1 to {} are allowed",
                limits.max_block_bytes
            );
            return Err(FieldError::new("header.length_bytes", problem).into());
        }
        let number = self.answers.len();
        let reserved = self
            .blocks
            .engine
            .reserve(key, place, length_bytes, self.kind);
        // After the reservation: what is invalidated from now on, its ticket knows.
        let engine = &self.blocks.engine;
        let survived = self.survived.as_ref();
        let into = match reserved {
            Reserve::Granted(_) if survived.is_some_and(|told| engine.is_undone(&key, told)) => {
                let refused = PutResult::rejected(Reason::Invalidated, 0);
                self.answers.push(Answer::Done(refused));
                Into::Nowhere
            }
            Reserve::Granted(grant) => Into::Slot {
                grant: Box::new(grant),
                landing: Landing::new(length_bytes),
            },
            Reserve::Present(presence) => {
                let answer = self.present(&key, presence);
                self.answers.push(answer);
                Into::Nowhere
            }
            Reserve::Rejected {
                reason,
                retry_after_ms,
            } => {
                self.answers
                    .push(Answer::Done(PutResult::rejected(reason, retry_after_ms)));
                Into::Nowhere
            }
        };
        self.filling = Some(Filling {
            number,
            length_bytes,
            received_bytes: 0,
            header,
            announced,
            into,
        });
        Ok(())
    }

    /// The next bytes of the current block.
    ///
    /// # Errors
    /// When there is no block, or it has more bytes than its header says.
    pub fn data(&mut self, bytes: &[u8]) -> Result<(), BlocksError> {
        self.received(bytes.len())?;
        if let Some(Filling {
            into: Into::Slot { grant, landing },
            ..
        }) = &mut self.filling
        {
            landing.land(bytes, grant.block.bytes_mut());
        }
        self.complete_if_whole();
        Ok(())
    }

    /// Where the next bytes of the current block belong, up to its end; `None` when they go nowhere, or
    /// there is no block.
    pub fn room(&mut self) -> Option<&mut [u8]> {
        match &mut self.filling {
            Some(Filling {
                into: Into::Slot { grant, .. },
                received_bytes,
                ..
            }) => Some(&mut grant.block.bytes_mut()[*received_bytes as usize..])
                .filter(|room| !room.is_empty()),
            _ => None,
        }
    }

    /// Bytes of the current block that are still to come and go nowhere.
    #[must_use]
    pub fn wasted_bytes(&self) -> usize {
        match &self.filling {
            Some(Filling {
                into: Into::Nowhere,
                received_bytes,
                length_bytes,
                ..
            }) => (length_bytes - received_bytes) as usize,
            _ => 0,
        }
    }

    /// So many bytes have been written into the room.
    ///
    /// # Errors
    /// As [`PutSession::data`].
    pub fn landed(&mut self, bytes: usize) -> Result<(), BlocksError> {
        self.received(bytes)?;
        if let Some(Filling {
            into: Into::Slot { grant, landing },
            ..
        }) = &mut self.filling
        {
            landing.landed(bytes, grant.block.bytes());
        }
        self.complete_if_whole();
        Ok(())
    }

    /// A whole page has been written into the room, and its sum made on the way.
    ///
    /// # Errors
    /// As [`PutSession::data`].
    pub fn landed_page(&mut self, bytes: usize, sum: u64) -> Result<(), BlocksError> {
        self.received(bytes)?;
        if let Some(Filling {
            into: Into::Slot { landing, .. },
            ..
        }) = &mut self.filling
        {
            landing.landed_page(bytes, sum);
        }
        self.complete_if_whole();
        Ok(())
    }

    /// So many bytes of the current block will never come, because they would go nowhere.
    ///
    /// # Errors
    /// As [`PutSession::data`].
    pub fn skip(&mut self, bytes: usize) -> Result<(), BlocksError> {
        self.count(bytes)?;
        self.complete_if_whole();
        Ok(())
    }

    /// The current block's sums, behind its data.
    ///
    /// # Errors
    /// When it is not whole, its header had them already, or they do not fit its length.
    pub fn sums(&mut self, sums: &v1::BlockSums) -> Result<(), BlocksError> {
        let wanting = self.filling.as_mut().filter(|filling| {
            filling.header.is_none() && filling.received_bytes == filling.length_bytes
        });
        let Some(filling) = wanting else {
            let problem = "came where no block had all its data and lacked its sums";
            return Err(FieldError::new("sums", problem).into());
        };
        let page_sums = block_sums(sums, filling.length_bytes)?;
        filling.header = Some(filling.announced.with_sums(page_sums, sums.seal));
        self.complete_if_whole();
        Ok(())
    }

    /// Takes note of bytes of the current block that came in.
    fn received(&mut self, bytes: usize) -> Result<(), BlocksError> {
        self.count(bytes)?;
        self.blocks.metrics.put_bytes.inc_by(bytes as u64);
        Ok(())
    }

    fn count(&mut self, bytes: usize) -> Result<(), BlocksError> {
        let Some(filling) = &mut self.filling else {
            return Err(FieldError::new("data", "came before any header").into());
        };
        let received_bytes = filling.received_bytes + bytes as u64;
        if received_bytes > filling.length_bytes {
            let problem = format!(
                "block {} has at least {received_bytes} bytes, its header says {}",
                filling.number, filling.length_bytes,
            );
            return Err(FieldError::new("data", problem).into());
        }
        filling.received_bytes = received_bytes;
        Ok(())
    }

    /// Answers the current block once it is whole.
    fn complete_if_whole(&mut self) {
        let Some(filling) = self.filling.as_mut().filter(|filling| filling.is_whole()) else {
            return;
        };
        let into = std::mem::replace(&mut filling.into, Into::Nowhere);
        if let (Into::Slot { grant, landing }, Some(header)) = (into, filling.header.clone()) {
            let answer = self.complete(*grant, header, landing);
            self.answers.push(answer);
            self.pass_on_if_much();
        }
    }

    fn check_whole(&self) -> Result<(), BlocksError> {
        let Some(filling) = self.filling.as_ref().filter(|filling| !filling.is_whole()) else {
            return Ok(());
        };
        let (number, length_bytes) = (filling.number, filling.length_bytes);
        let received_bytes = filling.received_bytes;
        let error = if received_bytes < length_bytes {
            let problem =
                format!("block {number} ended after {received_bytes} of {length_bytes} bytes");
            FieldError::new("data", problem)
        } else {
            let problem = format!("are missing behind block {number}, whose header has none");
            FieldError::new("sums", problem)
        };
        Err(error.into())
    }
}
