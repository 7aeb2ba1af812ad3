//! Put blocks.
//!
//! Units: blocks. Errors: when a call has no whole answer; a rejection is an answer.

use kvproto::{Chain, convert::answer::PutResult};

use super::Client;
use crate::{
    error::Error,
    fleet::put::Spreading,
    namespace::NamespaceHandle,
    open::Reopening,
    put::{self, PutBlock, PutOptions},
};

impl Client {
    /// Puts blocks of `chain`, and answers what became of each. A rejection is an answer.
    ///
    /// # Errors
    /// When the call has no whole answer; putting the same blocks again is safe.
    pub async fn put(
        &self,
        namespace: &NamespaceHandle,
        chain: &Chain,
        blocks: &[PutBlock<'_>],
        options: PutOptions,
    ) -> Result<Vec<PutResult>, Error> {
        namespace.check(chain)?;
        let deadline = self.until();
        if let Some(roster) = self.fleet.roster() {
            let spreading = Spreading {
                fleet: &self.fleet,
                namespace,
                chain,
                blocks,
                options,
                deadline,
            };
            return spreading.run(roster).await;
        }
        let inner = self.fleet.home();
        let mut reopening = Reopening::default();
        loop {
            match put::put(inner, deadline, namespace, chain, blocks, options).await {
                Ok(results) => return Ok(results),
                Err(error) => reopening.after(inner, namespace, error, deadline).await?,
            }
        }
    }
}
